"""The guide: its Python snippets give what they show, its C++ snippets compile and run, its reference is complete."""

import doctest
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch_divergence as td

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
PYTHON_PAGES = [page for page in PAGES if "```pycon" in page.read_text()]


def blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """(line number, text) of each fenced block, dedented: those of tabs are indented."""
    text = page.read_text()
    for match in re.finditer(rf"^( *)```{language}\n(.*?)^\1```$", text, re.M | re.S):
        yield text.count("\n", 0, match.start()) + 1, textwrap.dedent(match[2])


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=lambda p: p.name)
def test_python(page):
    """In the order of the page, in one namespace, as a reader who follows it would."""
    parser, failures, namespace = doctest.DocTestParser(), [], {}
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for line, text in blocks(page, "pycon"):
        test = parser.get_doctest(text, namespace, page.name, str(page), line)
        runner.run(test, out=failures.append, clear_globs=False)
        namespace = test.globs
    assert runner.tries > 0
    assert not runner.failures, "".join(failures)


def test_every_job_has_both_languages():
    """The index promises a snippet in each language for each line of its table."""
    text = (ROOT / "docs/index.md").read_text()
    jobs = re.findall(r"^\| \[[^]]*\]\(#([\w-]+)\)", text, re.M)
    sections = {
        re.sub(r"[^\w-]", "", title.lower().replace(" ", "-")): body
        for title, body in re.findall(r"^### (.*)\n((?:(?!^### ).*\n)*)", text, re.M)
    }
    assert len(jobs) == 11
    assert set(jobs) == set(sections)
    for job in jobs:
        assert "```pycon" in sections[job] and "```cpp" in sections[job], job


def test_reference_is_complete():
    documented = re.findall(
        r"^::: torch_divergence\.(\w+)$", "".join(p.read_text() for p in ROOT.glob("docs/api/*.md")), re.M
    )
    assert len(documented) == len(set(documented))
    assert set(documented) == {*td.functional.__all__, *td.modules.__all__, "empty_cache"}


def test_examples_are_listed():
    page = (ROOT / "docs/examples.md").read_text()
    python = [p for p in ROOT.glob("examples/python/*.py") if "__main__" in p.read_text()]
    named = [f"examples/python/{p.name}" for p in python] + [
        f"build/examples/{p.stem}" for p in ROOT.glob("examples/cpp/*.cpp")
    ]
    assert named
    for name in named:
        assert f"`{name}" in page, name


@pytest.mark.slow
def test_site(tmp_path):
    """No link is dead, no name unknown, no argument undocumented: in strict mode those are errors."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: see requirements-dev.txt")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed: see requirements-dev.txt")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    reference = (tmp_path / "api/functional.html").read_text()
    leftovers = re.findall(r":\w+:`|\.\. math|\\ :|```", re.sub(r"<pre.*?</pre>", "", reference, flags=re.S))
    assert not leftovers, leftovers


def program() -> str:
    """All C++ blocks as one program: each a function, in the order of the pages. Whole programs keep their own name."""
    includes, functions, calls = [], [], []
    for page in PAGES:
        for line, text in blocks(page, "cpp"):
            name = f"{page.stem}_{line}"
            includes += re.findall(r"^#include .*$", text, re.M)
            body = re.sub(r"^(#include .*|namespace td = .*)\n", "", text, flags=re.M).strip()
            if not body:
                continue
            body = (
                body.replace("int main()", f"int {name}()")
                if "int main()" in body
                else f"int {name}() {{\n{body}\nreturn 0;\n}}"
            )
            functions.append(f'#line {line} "{page}"\n{body}\n')
            calls.append(f'  if ({name}() != 0) throw std::logic_error("{name}");')
    head = [
        *dict.fromkeys([*includes, "#include <limits>", "#include <stdexcept>"]),
        "namespace td = torch_divergence;\n",
    ]
    main = ["int main() {", *calls, f'  std::cout << {len(calls)} << " snippets\\n";', "}"]
    return "\n".join([*head, *functions, *main]) + "\n"


@pytest.mark.slow
def test_cpp():
    """With the CMake file that the guide shows."""
    ((_, project),) = blocks(ROOT / "docs/cpp.md", "cmake")
    build = ROOT / "build" / "docs-cpp"
    build.mkdir(parents=True, exist_ok=True)
    (build / "CMakeLists.txt").write_text(project)
    (build / "app.cpp").write_text(program())
    for command in (
        [
            "cmake",
            "-S",
            build,
            "-B",
            build / "build",
            f"-DCMAKE_PREFIX_PATH={td.cmake_prefix_path}",
            f"-DPython3_EXECUTABLE={sys.executable}",
        ],
        ["cmake", "--build", build / "build"],
        [build / "build" / "app"],
    ):
        result = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stdout + result.stderr
    count = sum("```cpp" in line for page in PAGES for line in page.read_text().splitlines())
    assert f"{count - 1} snippets" in result.stdout  # the index's first block holds the includes alone
