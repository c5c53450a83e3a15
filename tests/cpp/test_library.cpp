// What the library says about itself, and what it brings into a process.
#include <gtest/gtest.h>
#include <link.h>
#include <torch/version.h>
#include <torch_divergence/functional.h>
#include <torch_divergence/version.h>

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <string>
#include <vector>

namespace td = torch_divergence;

namespace {

std::vector<std::string> loaded_libraries() {
  std::vector<std::string> names;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* out) {
        static_cast<std::vector<std::string>*>(out)->emplace_back(info->dlpi_name);
        return 0;
      },
      &names);
  return names;
}

bool any_contains(const std::vector<std::string>& names, const std::string& part) {
  return std::any_of(names.begin(), names.end(),
                     [&](const std::string& name) { return name.find(part) != std::string::npos; });
}

TEST(Library, NamesItsVersionAndTorchs) {
  EXPECT_EQ(td::version(), TORCH_DIVERGENCE_VERSION);
  EXPECT_EQ(td::torch_version(), TORCH_VERSION);
}

TEST(Library, LoadsWithoutPython) {
  const auto names = loaded_libraries();
  ASSERT_TRUE(any_contains(names, "libtorch_divergence.so"));
  ASSERT_TRUE(any_contains(names, "libtorch_cpu.so"));
  EXPECT_FALSE(any_contains(names, "libpython"));
  EXPECT_FALSE(any_contains(names, "libtorch_python"));
}

TEST(Library, UsesTheCpuCapabilityThatIsAskedFor) {
  const std::string used = td::cpu_capability();
  EXPECT_TRUE(used == "DEFAULT" || used == "AVX2" || used == "AVX512") << used;
  const char* asked = std::getenv("ATEN_CPU_CAPABILITY");
  if (asked != nullptr) {
    std::string name = asked;
    std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::toupper(c); });
    EXPECT_EQ(used, name);
  }
}

TEST(Library, EmptyCacheMayBeCalledAtAnyTime) {
  td::empty_cache();
  td::empty_cache();
}

}  // namespace
