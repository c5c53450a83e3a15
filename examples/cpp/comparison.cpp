// KL, JS and Wasserstein side by side: the comparison table of the field, computed. The C++ twin of
// `python -m torch_divergence`, with the same numbers.
//
// Two families slide from overlap to none: P and a shifted Q, discrete and Gaussian. For each shift the three
// divergences and their derivatives by the shift are printed; then every row of the comparison table is checked on
// them and on random distributions. The program fails if a row does not hold.
//
//     comparison            about a second
//     comparison --quick    the same
#include <torch/torch.h>
#include <torch_divergence/torch_divergence.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <limits>
#include <numbers>
#include <string>
#include <vector>

#include "program.h"

namespace td = torch_divergence;
using torch::Tensor;

constexpr auto kDouble = torch::kDouble;
const double kLog2 = std::log(2.0);

// One value for each divergence.
struct Three {
  double kl, js, wasserstein;
};

// One family at one shift: the divergences of P and Q, and their derivatives by the shift of Q.
struct Row {
  double shift;
  Three value, derivative;
};

struct Family {
  std::string name;
  std::vector<Row> rows;
  std::string note;
};

// printf into a string.
[[gnu::format(printf, 1, 2)]] std::string format(const char* pattern, ...) {
  char text[256];
  std::va_list arguments;
  va_start(arguments, pattern);
  std::vsnprintf(text, sizeof text, pattern, arguments);
  va_end(arguments);
  return text;
}

// `divergences` maps the shift to KL, JS and W.
Row differentiated(const std::function<std::vector<Tensor>(const Tensor&)>& divergences, double shift) {
  const auto x = torch::tensor(shift, torch::requires_grad().dtype(kDouble));
  const auto values = divergences(x);
  const auto derivative = [&](const Tensor& value) {
    return torch::autograd::grad({value}, {x}, {}, /*retain_graph=*/true)[0].item<double>();
  };
  return {shift,
          {values[0].item<double>(), values[1].item<double>(), values[2].item<double>()},
          {derivative(values[0]), derivative(values[1]), derivative(values[2])}};
}

// -- discrete: a bump on a line of bins -------------------------------------------------------------------------------

constexpr int64_t kBins = 61;
constexpr double kWidth = 8;

// Probabilities on the bins 0 ... 60: a smooth bump of half-width 8 around `centre`, exactly 0 outside of it.
Tensor bump(const Tensor& centre) {
  const auto position = torch::arange(kBins, kDouble);
  const auto height = (1 - ((position - centre) / kWidth).pow(2)).clamp_min(0).pow(3);
  return height / height.sum();
}

std::vector<Tensor> discrete_divergences(const Tensor& shift) {
  const auto p = bump(torch::tensor(15.0, kDouble)), q = bump(15.0 + shift);
  const auto position = torch::arange(kBins, kDouble);
  return {td::kl_div(q, p, td::KLDivOptions().space(td::Space::Probs)),
          td::js_div(q, p, td::JSDivOptions().space(td::Space::Probs)), td::wasserstein_1d(position, position, q, p)};
}

Family discrete_family() {
  Family family{"discrete: two bumps of 16 bins on a line, Q shifted",
                {},
                "KL is infinite as soon as a bin has Q = 0 < P: from a shift of one bin on."};
  for (const double shift : {0.0, 0.25, 1.0, 4.0, 8.0, 12.0, 15.0, 16.0, 20.0, 30.0})
    family.rows.push_back(differentiated(discrete_divergences, shift));
  return family;
}

// -- Gaussian ---------------------------------------------------------------------------------------------------------

// JS(N(0, 1), N(shift, 1)) by the trapezoidal rule, on a grid that reaches 12 beyond both means. For an analytic
// integrand that vanishes at both ends it converges faster than any power of the step; halving it shows its error.
Tensor gaussian_js(const Tensor& shift, int64_t points = 4001) {
  const double low = std::min(0.0, shift.item<double>()) - 12, high = std::max(0.0, shift.item<double>()) + 12;
  const auto x = torch::linspace(low, high, points, kDouble);
  const auto log_p = -x.pow(2) / 2, log_q = -(x - shift).pow(2) / 2;
  // Densities times the step are the probabilities of a discrete pair, whose JS is the rule's sum.
  const double step = std::log((high - low) / static_cast<double>(points - 1)) - std::log(2 * std::numbers::pi) / 2;
  return td::js_div(log_q + step, log_p + step, td::JSDivOptions().space(td::Space::LogProbs));
}

std::vector<Tensor> gaussian_divergences(const Tensor& shift) {
  const auto zero = torch::zeros({1}, kDouble), one = torch::ones({1, 1}, kDouble), mean = shift.reshape({1});
  // W1 of two Gaussians of one variance is the distance of the means, as is the root of W2^2.
  const auto squared = td::gaussian_wasserstein(mean, one, zero, one);
  const auto distance = torch::where(squared > 0, squared, 1).sqrt() * (squared > 0);
  return {td::gaussian_kl(zero, zero, mean, zero), gaussian_js(shift), distance};
}

Family gaussian_family() {
  Family family{"Gaussian: N(0, 1) and N(shift, 1)", {}, {}};
  double error = 0;
  for (const double shift : {0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0}) {
    const auto row = differentiated(gaussian_divergences, shift);
    const double finer = gaussian_js(torch::tensor(shift, kDouble), 8001).item<double>();
    error = std::max(error, std::abs(row.value.js - finer));
    family.rows.push_back(row);
  }
  family.note = format("JS by quadrature; halving the step changes it by at most %.1e.", error);
  return family;
}

// -- the table --------------------------------------------------------------------------------------------------------

// One row of the comparison table: what it says of each divergence, and whether the computation agrees.
struct Check {
  std::string property, kl, js, wasserstein;
  bool holds;
  std::string evidence;
};

std::vector<Tensor> random_distributions(int64_t batches) {
  const auto generator = at::make_generator<at::CPUGeneratorImpl>(0);
  return torch::randn({100 * batches, 6}, generator, kDouble).mul(2).softmax(-1).chunk(batches);
}

std::vector<Check> check_table(const Family& discrete, const Family& gaussian) {
  std::vector<Row> rows = discrete.rows, disjoint;
  rows.insert(rows.end(), gaussian.rows.begin(), gaussian.rows.end());
  for (const auto& row : discrete.rows)
    if (row.shift >= 2 * kWidth) disjoint.push_back(row);
  const auto &far_discrete = disjoint.back(), &far_gaussian = gaussian.rows.back();
  std::vector<Check> checks;

  constexpr double inf = std::numeric_limits<double>::infinity();
  std::vector<double> at_zero, apart;
  double largest_js = 0;
  for (const auto& row : rows) {
    auto& values = row.shift == 0 ? at_zero : apart;
    values.insert(values.end(), {row.value.kl, row.value.js, row.value.wasserstein});
    largest_js = std::max(largest_js, row.value.js);
  }
  // Of every value, so that a NaN fails
  const auto all = [](const std::vector<double>& values, auto&& condition) {
    return std::all_of(values.begin(), values.end(), condition);
  };
  const auto not_negative = [](double x) { return x >= 0; };
  const double least_apart = *std::min_element(apart.begin(), apart.end());
  const double least = std::min(least_apart, *std::min_element(at_zero.begin(), at_zero.end()));
  checks.push_back({"never negative", "yes", "yes", "yes", all(at_zero, not_negative) && all(apart, not_negative),
                    format("the least of %zu values is %.1g", at_zero.size() + apart.size(), least)});
  checks.push_back({"zero only for P = Q", "yes", "yes", "yes",
                    all(at_zero, [](double x) { return x < 1e-15; }) && all(apart, [](double x) { return x > 1e-4; }),
                    format("at most %.1g at shift 0, at least %.2g elsewhere",
                           *std::max_element(at_zero.begin(), at_zero.end()), least_apart)});

  using Divergence = std::function<Tensor(const Tensor&, const Tensor&)>;
  const auto position = torch::arange(6, kDouble).expand({100, 6});
  const Divergence kl = [](const Tensor& p, const Tensor& q) {
    return td::kl_div(q, p, td::KLDivOptions().space(td::Space::Probs).reduction(td::Reduction::None));
  };
  const Divergence js = [](const Tensor& p, const Tensor& q) {
    return td::js_div(q, p, td::JSDivOptions().space(td::Space::Probs).reduction(td::Reduction::None));
  };
  const Divergence wasserstein = [&](const Tensor& p, const Tensor& q) {
    return td::wasserstein_1d(position, position, p, q);
  };

  const auto pairs = random_distributions(2);
  const auto asymmetry = [&](const Divergence& d) {
    return (d(pairs[0], pairs[1]) - d(pairs[1], pairs[0])).abs().max().item<double>();
  };
  const Three skew{asymmetry(kl), asymmetry(js), asymmetry(wasserstein)};
  checks.push_back({"symmetric", "no", "yes", "yes", skew.kl > 0.1 && skew.js < 1e-14 && skew.wasserstein < 1e-14,
                    format("|D(P, Q) - D(Q, P)| up to %.2g, %.0e, %.0e", skew.kl, skew.js, skew.wasserstein)});

  const bool only_kl_infinite = std::all_of(disjoint.begin(), disjoint.end(), [](const Row& row) {
    return row.value.kl == inf && std::isfinite(row.value.js) && std::isfinite(row.value.wasserstein);
  });
  checks.push_back({"where Q = 0 < P", "infinite", "finite", "finite", only_kl_infinite,
                    format("at %zu shifts without overlap", disjoint.size())});

  checks.push_back(
      {"bounded", "no", "by log 2", "no",
       largest_js <= kLog2 * (1 + 1e-15) && std::abs(largest_js - kLog2) < 1e-12 && far_gaussian.value.kl > 100,
       format("JS at most log 2 %+.0e, KL %g, W %g", largest_js - kLog2, far_gaussian.value.kl,
              far_gaussian.value.wasserstein)});

  const double js_slope = std::max(std::abs(far_discrete.derivative.js), std::abs(far_gaussian.derivative.js));
  const double slopes[] = {far_discrete.derivative.wasserstein, far_gaussian.derivative.wasserstein};
  checks.push_back({"gradient without overlap", "none, or grows", "vanishes", "stays",
                    js_slope < 1e-12 && std::abs(slopes[0] - 1) < 1e-3 && std::abs(slopes[1] - 1) < 1e-3 &&
                        far_gaussian.derivative.kl > 10,
                    format("JS' %.0e, W' %.6f and %.6f, KL' of the Gaussians %g", js_slope, slopes[0], slopes[1],
                           far_gaussian.derivative.kl)});

  const auto triples = random_distributions(3);
  const auto slack = [&](const Divergence& d) {
    return (d(triples[0], triples[1]) + d(triples[1], triples[2]) - d(triples[0], triples[2])).min().item<double>();
  };
  const Three gap{slack(kl), slack(js), slack(wasserstein)};
  const double root_gap = slack([&](const Tensor& p, const Tensor& q) { return js(p, q).sqrt(); });
  checks.push_back({"triangle inequality", "no", "no (its root: yes)", "yes",
                    gap.kl < 0 && gap.wasserstein >= -1e-14 && root_gap >= -1e-14,
                    format("D(A, B) + D(B, C) - D(A, C) of 100 triples: at least %.2g, %.2g, %.2g", gap.kl, gap.js,
                           gap.wasserstein)});
  return checks;
}

// -- on the terminal --------------------------------------------------------------------------------------------------

// Columns of text under their header, the first line; the first column is aligned to the left.
void print_table(const std::vector<std::vector<std::string>>& lines) {
  std::vector<int> widths(lines[0].size());
  for (const auto& line : lines)
    for (size_t i = 0; i < widths.size(); ++i) widths[i] = std::max(widths[i], static_cast<int>(line[i].size()));
  for (size_t n = 0; n < lines.size(); ++n) {
    std::string text;
    for (size_t i = 0; i < widths.size(); ++i)
      text += format("%s%*s", i == 0 ? "" : "  ", i == 0 ? -widths[i] : widths[i], lines[n][i].c_str());
    std::printf("%s\n", text.substr(0, text.find_last_not_of(' ') + 1).c_str());
    if (n > 0) continue;
    for (size_t i = 0; i < widths.size(); ++i)
      std::printf("%s%s", i == 0 ? "" : "  ", std::string(widths[i], '-').c_str());
    std::printf("\n");
  }
}

void print_family(const Family& family) {
  std::vector<std::vector<std::string>> lines{{"shift", "KL(P||Q)", "JS", "W1", "dKL", "dJS", "dW1"}};
  for (const auto& [shift, value, derivative] : family.rows) {
    auto& line = lines.emplace_back();
    for (const double x :
         {shift, value.kl, value.js, value.wasserstein, derivative.kl, derivative.js, derivative.wasserstein})
      line.push_back(std::isnan(x) ? "nan" : format("%.6g", x));
  }
  std::printf("%s\n\n", family.name.c_str());
  print_table(lines);
  std::printf("\n%s\n\n\n", family.note.c_str());
}

int run(bool /*quick*/) {
  const auto discrete = discrete_family(), gaussian = gaussian_family();
  print_family(discrete);
  print_family(gaussian);
  const auto checks = check_table(discrete, gaussian);
  std::vector<std::vector<std::string>> lines{{"", "KL", "JS", "Wasserstein", "computed"}};
  for (const auto& check : checks)
    lines.push_back({check.property, check.kl, check.js, check.wasserstein, check.holds ? "holds" : "FAILS"});
  print_table(lines);
  std::printf("\n");
  for (const auto& check : checks) std::printf("%s: %s\n", check.property.c_str(), check.evidence.c_str());
  return std::all_of(checks.begin(), checks.end(), [](const Check& check) { return check.holds; }) ? 0 : 1;
}

int main(int argc, char** argv) { return run_program(argc, argv, run); }
