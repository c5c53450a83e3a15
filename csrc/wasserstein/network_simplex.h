// The transportation problem, min sum_ij c_ij w_ij with sum_j w_ij = a_i and sum_i w_ij = b_j, by the network simplex
// method (Dantzig, "Application of the Simplex Method to a Transportation Problem", 1951; Ahuja, Magnanti and Orlin,
// "Network Flows", 1993, chapter 11). No ATen.
//
// A basis is a spanning tree of the N + M points; the flow on its edges is the only one with these marginals, and its
// potentials f_i + g_j = c_ij on the tree tell by c_ij - f_i - g_j < 0 which edge improves it.
//
// Degenerate trees (edges without flow) are the rule where weights are equal, and pivots on them need not improve
// anything. So masses are integers of a grid, perturbed by less than its step such that no edge of any tree is without
// flow (Orden, "The transshipment problem", 1956): every pivot improves the cost, and arithmetic on masses is exact.
// A tree that is optimal for the perturbed masses is optimal for those on the grid. The flow for the masses as they
// were given follows from the tree (transport_tree.h).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

namespace torch_divergence {

class NetworkSimplex {
 public:
  // cost: n x m, by rows. a (n) and b (m): not negative, of equal sums.
  NetworkSimplex(const double* cost, int64_t n, int64_t m, const double* a, const double* b)
      : cost_(cost), n_(n), m_(m), nodes_(static_cast<size_t>(n + m)) {
    start(to_grid(a, b));
  }

  // False if it was not done within as many pivots as only rounding errors can make necessary.
  bool solve() {
    int64_t row = 0;
    const int64_t limit = 1000 * (n_ + m_) + 100000;
    for (int64_t pivots = 0, since_refresh = 0; pivots < limit; ++pivots, ++since_refresh) {
      Edge entering = cheapest_edge(row);
      if (entering.row < 0 || since_refresh > n_ + m_) {
        // Potentials carry the roundings of the pivots so far: look again at exact ones before stopping.
        const bool exact = since_refresh == 0;
        if (entering.row < 0 && exact) return true;
        hang(0, -1);
        since_refresh = 0;
        entering = cheapest_edge(row);
        if (entering.row < 0) return true;
      }
      pivot(entering);
    }
    return false;
  }

  // The edges of the tree, n + m - 1 of them.
  void tree(int64_t* rows, int64_t* cols) const {
    for (int64_t v = 1; v < n_ + m_; ++v) {
      const int64_t p = nodes_[v].parent;
      *rows++ = std::min(v, p);
      *cols++ = std::max(v, p) - n_;
    }
  }

 private:
  // Points x_0 .. x_{n-1}, then y_0 .. y_{m-1}. The root is x_0.
  struct Node {
    int64_t parent = -1, depth = 0;
    int64_t child = -1, next = -1, previous = -1;  // children in a doubly linked list
    int64_t flow = 0;                              // on the edge to the parent
    double potential = 0;
  };
  struct Edge {
    int64_t row, col;
    double reduced;
  };

  bool is_row(int64_t v) const { return v < n_; }
  double cost(int64_t v, int64_t w) const { return cost_[std::min(v, w) * m_ + std::max(v, w) - n_]; }

  // Masses as integers: multiples of a step, of which every column has at least one, plus 1 for every row and n for the
  // last column. No sum over some rows equals one over some columns then, unless it is over all.
  std::vector<int64_t> to_grid(const double* a, const double* b) const {
    constexpr double kTotal = static_cast<double>(int64_t{1} << 60);
    int64_t step = 1;
    while (step <= n_) step *= 2;
    std::vector<int64_t> mass(nodes_.size());
    const auto side = [&](const double* w, int64_t count, int64_t least, int64_t* out) {
      double sum = 0;
      for (int64_t i = 0; i < count; ++i) sum += w[i];
      const double steps = kTotal / static_cast<double>(step) / (sum > 0 ? sum : 1);
      int64_t total = 0;
      for (int64_t i = 0; i < count; ++i) total += out[i] = std::max<int64_t>(least, std::llround(w[i] * steps));
      return total;
    };
    int64_t *const rows = mass.data(), *const cols = mass.data() + n_;
    const int64_t of_rows = side(a, n_, 0, rows), of_cols = side(b, m_, 1, cols);
    // What rounding left over goes where it is relatively least.
    if (of_rows < of_cols) {
      *std::max_element(rows, rows + n_) += of_cols - of_rows;
    } else {
      *std::max_element(cols, cols + m_) += of_rows - of_cols;
    }
    for (int64_t v = 0; v < n_ + m_; ++v) mass[v] *= step;
    for (int64_t i = 0; i < n_; ++i) rows[i] += 1;
    cols[m_ - 1] += n_;
    return mass;
  }

  // A first tree: each row in turn to its cheapest columns that are not full. Every allocation but the last fills
  // either a row or a column, which makes the edges a tree.
  void start(std::vector<int64_t> mass) {
    struct Allocation {
      int64_t row, col, flow;
    };
    std::vector<Allocation> allocations;
    std::vector<int64_t> open(m_);
    for (int64_t j = 0; j < m_; ++j) open[j] = j;
    for (int64_t i = 0; i < n_; ++i) {
      while (mass[i] > 0) {
        size_t best = 0;
        for (size_t k = 1; k < open.size(); ++k)
          if (cost_[i * m_ + open[k]] < cost_[i * m_ + open[best]]) best = k;
        const int64_t j = open[best], moved = std::min(mass[i], mass[n_ + j]);
        allocations.push_back({i, n_ + j, moved});
        mass[i] -= moved;
        mass[n_ + j] -= moved;
        if (mass[n_ + j] == 0) {
          open[best] = open.back();
          open.pop_back();
        }
      }
    }
    // Hang the edges on the root.
    std::vector<std::vector<std::pair<int64_t, int64_t>>> adjacent(nodes_.size());
    for (const auto& e : allocations) {
      adjacent[e.row].emplace_back(e.col, e.flow);
      adjacent[e.col].emplace_back(e.row, e.flow);
    }
    std::vector<int64_t> stack{0};
    while (!stack.empty()) {
      const int64_t v = stack.back();
      stack.pop_back();
      for (const auto& [w, flow] : adjacent[v]) {
        if (w == nodes_[v].parent) continue;
        nodes_[w].flow = flow;
        attach(w, v);
        stack.push_back(w);
      }
    }
    hang(0, -1);
  }

  void attach(int64_t v, int64_t parent) {
    Node& node = nodes_[v];
    node.parent = parent;
    node.previous = -1;
    node.next = nodes_[parent].child;
    if (node.next >= 0) nodes_[node.next].previous = v;
    nodes_[parent].child = v;
  }
  void detach(int64_t v) {
    const Node& node = nodes_[v];
    if (node.previous >= 0) {
      nodes_[node.previous].next = node.next;
    } else {
      nodes_[node.parent].child = node.next;
    }
    if (node.next >= 0) nodes_[node.next].previous = node.previous;
  }

  // Depths and potentials of the subtree at v, from those of its parent (-1: v is the root).
  void hang(int64_t v, int64_t parent) {
    stack_.assign(1, v);
    nodes_[v].depth = parent < 0 ? 0 : nodes_[parent].depth + 1;
    nodes_[v].potential = parent < 0 ? 0 : cost(v, parent) - nodes_[parent].potential;
    while (!stack_.empty()) {
      const int64_t w = stack_.back();
      stack_.pop_back();
      for (int64_t c = nodes_[w].child; c >= 0; c = nodes_[c].next) {
        nodes_[c].depth = nodes_[w].depth + 1;
        nodes_[c].potential = cost(c, w) - nodes_[w].potential;
        stack_.push_back(c);
      }
    }
    copy_potentials();
  }
  void copy_potentials() {
    of_cols_.resize(static_cast<size_t>(m_));
    for (int64_t j = 0; j < m_; ++j) of_cols_[j] = nodes_[n_ + j].potential;
  }

  // The edge of the least reduced cost among a few rows from `row` on, which moves behind them; row -1 if there is none
  // below 0 in any row. Rounding of the potentials is not below 0.
  Edge cheapest_edge(int64_t& row) const {
    constexpr double kRounding = 64 * std::numeric_limits<double>::epsilon();
    const int64_t block =
        std::max<int64_t>(1, static_cast<int64_t>(std::sqrt(static_cast<double>(n_) / static_cast<double>(m_))));
    Edge best{-1, -1, 0};
    for (int64_t seen = 1; seen <= n_; ++seen) {
      const double* const c = cost_ + row * m_;
      const double least = least_difference(c, of_cols_.data(), m_);
      const double f = nodes_[row].potential;
      if (least - f < best.reduced) {
        int64_t j = 0;
        while (c[j] - of_cols_[j] != least) ++j;
        if (least - f < -kRounding * (std::abs(c[j]) + std::abs(f) + std::abs(of_cols_[j]))) best = {row, j, least - f};
      }
      row = row + 1 == n_ ? 0 : row + 1;
      if (best.row >= 0 && seen % block == 0) break;
    }
    return best;
  }

  // min_j c[j] - g[j], in lanes, because compilers keep the order of a floating-point minimum.
  static double least_difference(const double* c, const double* g, int64_t count) {
    constexpr int64_t kLanes = 8;
    double least[kLanes];
    std::fill_n(least, kLanes, std::numeric_limits<double>::infinity());
    int64_t j = 0;
    for (; j + kLanes <= count; j += kLanes)
      for (int64_t k = 0; k < kLanes; ++k) least[k] = std::min(least[k], c[j + k] - g[j + k]);
    for (; j < count; ++j) least[0] = std::min(least[0], c[j] - g[j]);
    return *std::min_element(least, least + kLanes);
  }

  // Sends as much as possible along the cycle that the entering edge closes. The edge of the cycle that is emptied
  // leaves the tree.
  void pivot(const Edge& entering) {
    const int64_t i = entering.row, j = n_ + entering.col;
    // Up from i the edges at rows lose flow and those at columns gain it; up from j the other way round.
    int64_t leaving = -1, moved = std::numeric_limits<int64_t>::max();
    bool on_row_side = true;
    const auto consider = [&](int64_t v, bool row_side) {
      if (is_row(v) == row_side && nodes_[v].flow < moved) {
        moved = nodes_[v].flow;
        leaving = v;
        on_row_side = row_side;
      }
    };
    int64_t p = i, q = j;
    while (p != q) {
      if (nodes_[p].depth >= nodes_[q].depth) {
        consider(p, true);
        p = nodes_[p].parent;
      } else {
        consider(q, false);
        q = nodes_[q].parent;
      }
    }
    const int64_t apex = p;
    for (int64_t v = i; v != apex; v = nodes_[v].parent) nodes_[v].flow += is_row(v) ? -moved : moved;
    for (int64_t v = j; v != apex; v = nodes_[v].parent) nodes_[v].flow += is_row(v) ? moved : -moved;

    // The part below the leaving edge is turned over and hung on the entering one.
    int64_t v = on_row_side ? i : j, parent = on_row_side ? j : i, flow = moved;
    const int64_t top = v, above = parent;
    for (bool done = false; !done;) {
      const int64_t next = nodes_[v].parent, next_flow = nodes_[v].flow;
      done = v == leaving;
      detach(v);
      attach(v, parent);
      nodes_[v].flow = flow;
      parent = v;
      v = next;
      flow = next_flow;
    }
    shift(top, above, on_row_side ? entering.reduced : -entering.reduced);
  }

  // The subtree at v has moved: rows' potentials by `by`, columns' by -by.
  void shift(int64_t v, int64_t parent, double by) {
    nodes_[v].depth = nodes_[parent].depth + 1;
    stack_.assign(1, v);
    while (!stack_.empty()) {
      const int64_t w = stack_.back();
      stack_.pop_back();
      if (is_row(w)) {
        nodes_[w].potential += by;
      } else {
        nodes_[w].potential -= by;
        of_cols_[w - n_] = nodes_[w].potential;
      }
      for (int64_t c = nodes_[w].child; c >= 0; c = nodes_[c].next) {
        nodes_[c].depth = nodes_[w].depth + 1;
        stack_.push_back(c);
      }
    }
  }

  const double* cost_;
  int64_t n_, m_;
  std::vector<Node> nodes_;
  std::vector<double> of_cols_;  // potentials of the columns, side by side
  std::vector<int64_t> stack_;
};

}  // namespace torch_divergence
