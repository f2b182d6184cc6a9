// The CPU ops that compute the planes of rotations.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../rotation_planes.h"
#include "arguments.h"

namespace gistops {
namespace {

using TwoTensors = std::tuple<Tensor, Tensor>;

// Returns x, contiguous and checked.
Tensor checked_vectors(const Tensor& x, torch::headeronly::IntHeaderOnlyArrayRef sizes, const char* name) {
  STD_TORCH_CHECK(x.is_cpu(), "gistops: ", name, ": expected a tensor on the CPU, got one on another device");
  format_of(x, name);
  STD_TORCH_CHECK(std::equal(x.sizes().begin(), x.sizes().end(), sizes.begin(), sizes.end()), "gistops: ", name,
                  ": expected shape ", shape_text(sizes), ", got ", shape_text(x.sizes()));
  return converted(x, x.scalar_type());
}

void load(const Tensor& x, const char* name, double* out) {
  kernels<double>().load(x.const_data_ptr(), format_of(x, name), x.numel(), out);
}

void store(const double* x, const Tensor& out, const char* name) {
  kernels<double>().store(x, out.numel(), format_of(out, name), out.mutable_data_ptr());
}

// The rotations of an op's arguments.
struct Rotations {
  int64_t m, d;
  Tensor displacements, axis;
  RotationPlanes planes;

  Rotations(const Tensor& delta, const Tensor& u)
      : m(size(delta, 0)), d(size(delta, 1)), displacements(checked_vectors(delta, {m, d}, "displacements")),
        axis(checked_vectors(u, {d}, "axis")), planes(vectors(displacements, axis).get(), m, d) {}

 private:
  static int64_t size(const Tensor& delta, int64_t dim) {
    STD_TORCH_CHECK(delta.dim() == 2 && delta.size(1) >= 1,
                    "gistops: displacements: expected shape [m, d] with d >= 1, got ", shape_text(delta.sizes()));
    STD_TORCH_CHECK(delta.size(0) < 256, "gistops: displacements: expected at most 255 rows, got ", delta.size(0));
    return delta.size(dim);
  }
  static Scratch<double> vectors(const Tensor& displacements, const Tensor& axis) {
    Scratch<double> made(axis.numel() + displacements.numel());
    load(axis, "axis", made.get());
    load(displacements, "displacements", made.get() + axis.numel());
    return made;
  }
};

TwoTensors rotation_planes(const Tensor& displacements, const Tensor& axis, ScalarType dtype) {
  const Rotations r(displacements, axis);
  const Tensor directions = empty_on_device_of(displacements, {r.m + 1, r.d}, dtype),
               turns = empty_on_device_of(displacements, {3, r.m}, dtype);
  store(r.planes.directions.get(), directions, "dtype");
  store(r.planes.turns.get(), turns, "dtype");
  return {directions, turns};
}

TwoTensors rotation_planes_backward(const Tensor& grad_directions, const Tensor& grad_turns,
                                    const Tensor& displacements, const Tensor& axis) {
  const Rotations r(displacements, axis);
  const Scratch<double> of_directions((r.m + 1) * r.d), of_turns(3 * r.m), grad((r.m + 1) * r.d);
  load(checked_vectors(grad_directions, {r.m + 1, r.d}, "grad_directions"), "grad_directions", of_directions.get());
  load(checked_vectors(grad_turns, {3, r.m}, "grad_turns"), "grad_turns", of_turns.get());
  r.planes.backward(of_directions.get(), of_turns.get(), grad.get());
  const Tensor grad_displacements = empty_on_device_of(displacements, {r.m, r.d}, displacements.scalar_type()),
               grad_axis = empty_on_device_of(axis, {r.d}, axis.scalar_type());
  store(grad.get(), grad_axis, "axis");
  store(grad.get() + r.d, grad_displacements, "displacements");
  return {grad_displacements, grad_axis};
}

}  // namespace
}  // namespace gistops

STABLE_TORCH_LIBRARY_IMPL(gistops, CPU, m) {
  m.impl("rotation_planes", TORCH_BOX(&gistops::rotation_planes));
  m.impl("rotation_planes_backward", TORCH_BOX(&gistops::rotation_planes_backward));
}
