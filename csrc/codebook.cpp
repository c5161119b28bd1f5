#include "codebook.h"

#include <cmath>
#include <limits>

namespace tq {
namespace {

constexpr int kHalf = kLevels / 2;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

double density(double x) { return std::exp(-x * x / 2) / std::sqrt(2 * M_PI); }
double upper_tail(double x) { return std::erfc(x / std::sqrt(2.0)) / 2; }  // P(X > x)

// E[X | a < X < b] of a standard normal X, 0 <= a < b. Both differences are of upper tails, which
// keep their precision where the distribution function is close to 1.
double conditional_mean(double a, double b) {
  return (density(a) - density(b)) / (upper_tail(a) - upper_tail(b));
}

// Lloyd's iteration on the positive levels; the negative ones mirror them, so the boundary in the
// middle is 0. The step contracts by about 0.98; it ends when no level moves any more, or moves
// only in its last bits.
std::array<double, kHalf> solve() {
  std::array<double, kHalf> level;
  for (int i = 0; i < kHalf; ++i) level[i] = (i + 0.5) * 3.0 / kHalf;
  for (double moved = 1; moved > 1e-15;) {
    moved = 0;
    double lower = 0;
    for (int i = 0; i < kHalf; ++i) {
      const double upper = i + 1 < kHalf ? (level[i] + level[i + 1]) / 2 : kInfinity;
      const double mean = conditional_mean(lower, upper);
      moved = std::fmax(moved, std::fabs(mean - level[i]));
      level[i] = mean;
      lower = upper;
    }
  }
  return level;
}

}  // namespace

Codebook codebook(int dim) {
  static const std::array<double, kHalf> level = solve();
  Codebook book;
  for (int i = 0; i < kHalf; ++i) {
    const auto centroid = static_cast<float>(level[i] / std::sqrt(static_cast<double>(dim)));
    book.centroids[kHalf + i] = centroid;
    book.centroids[kHalf - 1 - i] = -centroid;
  }
  for (int i = 0; i < kBoundaries; ++i)
    book.boundaries[i] = (book.centroids[i] + book.centroids[i + 1]) / 2;
  return book;
}

}  // namespace tq
