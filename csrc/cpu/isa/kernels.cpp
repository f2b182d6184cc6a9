// The vectorized inner loops. This folder is compiled once per instruction set, with GISTOPS_ISA as its name
// (gistops/_build.py). It includes no header of torch, and all it defines is in an unnamed namespace or named after the
// instruction set, so that the linker cannot use code for a newer processor in place of code for an older one.
#include "kernels.h"

#include "convert.h"
#include "dots.h"
#include "dots_bf16.h"
#include "layout.h"
#include "norm_correction.h"
#include "rotation.h"
#include "simd.h"
#include "softmax.h"
#include "subcenter.h"
#include "translation.h"

#define GISTOPS_JOIN_(a, b) a##b
#define GISTOPS_JOIN(a, b) GISTOPS_JOIN_(a, b)
#define GISTOPS_STRING_(a) #a
#define GISTOPS_STRING(a) GISTOPS_STRING_(a)

namespace {

template <class T>
constexpr gistops::Kernels<T> kTable = {
    .load = load_format<T>,
    .store = store_format<T>,
    .transpose = transpose<T>,
    .pair_rows = pair_rows,
    .dots = dots<T>,
    .dots_bf16 = kDotsBf16<T>,
    .rnorms = rnorms<T>,
    .max_over_slots = max_over_slots<T>,
    .route_grad = route_grad<T>,
    .norm_correction = norm_correction<T>,
    .normalize_backward = normalize_backward<T>,
    .update_logsumexp = update_logsumexp<T>,
    .softmax_grad = softmax_grad<T>,
    .any_above = any_above<T>,
    .max_over_subcenters = max_over_subcenters<T>,
    .add_winners = add_winners<T>,
    .add_to_winners = add_to_winners<T>,
    .rotation_max_over_slots = rotation_max_over_slots<T>,
    .rotation_route_grad = rotation_route_grad<T>,
    .rotation_correction = rotation_correction<T>,
    .name = GISTOPS_STRING(GISTOPS_ISA),
};

}  // namespace

namespace gistops {

#define GISTOPS_TABLE(isa, T) GISTOPS_JOIN(GISTOPS_JOIN(table_, isa), _##T)
extern const Kernels<float>* const GISTOPS_TABLE(GISTOPS_ISA, float) = &kTable<float>;
extern const Kernels<double>* const GISTOPS_TABLE(GISTOPS_ISA, double) = &kTable<double>;

}  // namespace gistops
