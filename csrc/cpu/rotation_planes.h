// The planes of the rotations from an axis to displacements, and their backward, in float64:
// gistops/functional/transforms/rotation.py has the definition, in the same notation. The work does not depend on the
// number of classes.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "isa/kernels.h"
#include "scratch.h"

namespace gistops {

class RotationPlanes {
 public:
  // vectors [m + 1, d]: the axis, then the displacements.
  RotationPlanes(const double* vectors, int64_t m, int64_t d)
      : directions((m + 1) * d), turns(3 * m), m_(m), d_(d), unit_((m + 1) * d), length_(m + 1), cosine_(m + 1),
        sine_(m + 1), kind_(m + 1) {
    for (int64_t j = 0; j <= m; ++j) length_[j] = normalize(vectors + j * d, &unit_[j * d]);
    std::copy_n(unit_.get(), d, directions.get());
    for (int64_t j = 1; j <= m; ++j) set_turn(j);
  }

  // Writes the gradients of the vectors, [m + 1, d], from those of the directions [m + 1, d] and of the turns [3, m].
  void backward(const double* grad_directions, const double* grad_turns, double* grad) const {
    std::copy_n(grad_directions, d_, grad);  // of u, to which the planes add
    for (int64_t j = 1; j <= m_; ++j) {
      double* grad_unit = grad + j * d_;
      std::fill_n(grad_unit, d_, 0.0);
      const double* turn = grad_turns + j - 1;
      if (kind_[j] == Kind::opposite) add_orthogonal_backward(grad_directions + j * d_, grad);
      if (kind_[j] == Kind::acute || kind_[j] == Kind::obtuse)
        plane_backward(j, grad_directions + j * d_, turn[0], turn[m_], turn[2 * m_], grad_unit, grad);
      normalize_backward(j, grad_unit);
    }
    normalize_backward(0, grad);
  }

  Scratch<double> directions, turns;  // [m + 1, d]: u and p_j; [3, m]: a, b and n

 private:
  // The angle from the axis to a displacement. none: one of the two is 0.
  enum class Kind { none, acute, obtuse, opposite };

  void set_turn(int64_t j) {
    const double *u = unit_.get(), *v = &unit_[j * d_];
    double *p = &directions[j * d_], *turn = &turns[j - 1];
    double c = 1, n = 1;
    Kind& kind = kind_[j];
    if (length_[0] <= kMinNorm || length_[j] <= kMinNorm) {
      kind = Kind::none;
      std::fill_n(p, d_, 0.0);
    } else {
      c = dot(v, u);
      for (int64_t e = 0; e < d_; ++e) p[e] = v[e] - c * u[e];
      const double s = std::sqrt(dot(p, p));
      kind = !(c < 0) ? Kind::acute : s <= kMinNorm ? Kind::opposite : Kind::obtuse;
      if (kind == Kind::obtuse) n = s;
      if (kind == Kind::opposite) c = -1, n = 0, orthogonal(p);
    }
    if (kind == Kind::obtuse)
      for (int64_t e = 0; e < d_; ++e) p[e] /= n;
    cosine_[j] = c, sine_[j] = n;
    turn[0] = c - 1;
    turn[m_] = c < 0 ? c - 1 : -1 / (1 + c);
    turn[2 * m_] = n;
  }

  // Adds the gradients of u and of the unit vector of a displacement.
  void plane_backward(int64_t j, const double* grad_p, double grad_a, double grad_b, double grad_n, double* grad_unit,
                      double* grad_u) const {
    const double *u = unit_.get(), *v = &unit_[j * d_], *p = &directions[j * d_];
    const double c = cosine_[j], s = sine_[j];
    double grad_c = grad_a + (kind_[j] == Kind::obtuse ? grad_b : grad_b / ((1 + c) * (1 + c)));
    // From here on grad_unit is the gradient of r = v - c u: of p = r, or of p = r / s and n = s.
    const double along = kind_[j] == Kind::obtuse ? dot(grad_p, p) : 0;
    for (int64_t e = 0; e < d_; ++e)
      grad_unit[e] = kind_[j] == Kind::obtuse ? (grad_p[e] - along * p[e]) / s + grad_n * p[e] : grad_p[e];
    grad_c -= dot(grad_unit, u);
    for (int64_t e = 0; e < d_; ++e) {
      grad_u[e] += grad_c * v[e] - c * grad_unit[e];
      grad_unit[e] += grad_c * u[e];
    }
  }

  // Writes the unit vector in the plane of u and the coordinate axis that is farthest from u, orthogonal to u. Returns
  // the norm that has been divided by.
  double orthogonal(double* p) const {
    const double* u = unit_.get();
    const int64_t place = farthest();
    for (int64_t e = 0; e < d_; ++e) p[e] = (e == place ? 1 : 0) - u[place] * u[e];
    return normalize(p, p);
  }

  void add_orthogonal_backward(const double* grad_p, double* grad_u) const {
    Scratch<double> p(d_);
    const double *u = unit_.get(), length = orthogonal(p.get()), along = length > kMinNorm ? dot(grad_p, p.get()) : 0;
    const int64_t place = farthest();
    double sum = 0;
    for (int64_t e = 0; e < d_; ++e) {
      p[e] = (grad_p[e] - along * p[e]) / std::max(length, kMinNorm);
      sum += p[e] * u[e];
      grad_u[e] -= u[place] * p[e];
    }
    grad_u[place] -= sum;
  }

  // The coordinate in which u is smallest.
  int64_t farthest() const {
    int64_t place = 0;
    for (int64_t e = 1; e < d_; ++e)
      if (std::abs(unit_[e]) < std::abs(unit_[place])) place = e;
    return place;
  }

  // Writes x / max(|x|, kMinNorm) and returns |x|, which is NaN if its square overflows.
  double normalize(const double* x, double* out) const {
    double length = std::sqrt(dot(x, x));
    if (std::isinf(length)) length = std::numeric_limits<double>::quiet_NaN();
    const double divisor = length < kMinNorm ? kMinNorm : length;
    for (int64_t e = 0; e < d_; ++e) out[e] = x[e] / divisor;
    return length;
  }

  // From the gradient of a unit vector to that of the vector; a norm that is clamped is constant.
  void normalize_backward(int64_t j, double* grad) const {
    const double *unit = &unit_[j * d_], along = length_[j] <= kMinNorm ? 0 : dot(grad, unit);
    const double divisor = length_[j] < kMinNorm ? kMinNorm : length_[j];
    for (int64_t e = 0; e < d_; ++e) grad[e] = (grad[e] - along * unit[e]) / divisor;
  }

  double dot(const double* x, const double* y) const {
    double sum = 0;
    kernels<double>().dots(x, 1, d_, y, 1, nullptr, &sum, 1);
    return sum;
  }

  int64_t m_, d_;
  Scratch<double> unit_;  // [m + 1, d]: u and the unit vectors of the displacements
  Scratch<double> length_, cosine_, sine_;
  std::vector<Kind> kind_;
};

}  // namespace gistops
