// The Python module _C. Loading it loads libtorch_divergence, whose static initialisers register the operators, which
// Python calls through torch.ops; what is bound here are facts about the build and nothing else.
#include <pybind11/pybind11.h>
#include <torch_divergence/functional.h>
#include <torch_divergence/version.h>

#include <sstream>
#include <string>

namespace {

pybind11::tuple cuda_architectures() {
  pybind11::list names;
  std::istringstream list(TORCH_DIVERGENCE_CUDA_ARCHITECTURES);
  for (std::string name; std::getline(list, name, ';');) {
    names.append(name);
  }
  return pybind11::tuple(names);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  // A call into the library, not the header's macro: a linker that drops unneeded libraries would drop this one.
  m.attr("__version__") = torch_divergence::version();
  m.attr("torch_version") = torch_divergence::torch_version();
  m.attr("cuda") = bool(TORCH_DIVERGENCE_CUDA);
  m.attr("cuda_architectures") = cuda_architectures();
  m.def("cpu_capability", &torch_divergence::cpu_capability);
  m.def("empty_cache", &torch_divergence::empty_cache, pybind11::call_guard<pybind11::gil_scoped_release>());
}
