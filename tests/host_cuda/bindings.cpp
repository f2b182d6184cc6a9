// Python bindings of the CUDA ops, compiled for the host, on numpy arrays. Half-precision arrays are uint16.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "device.cuh"
#include "grad_centers_launch.cuh"
#include "launch.cuh"
#include "op_table.h"
#include "parked_scores.cuh"

namespace py = pybind11;
namespace gc = gistops::cuda;

namespace {

const gc::OpTable& op_table(const std::string& type) {
  if (type == "bf16") return gc::bf16_ops;
  if (type == "f16") return gc::f16_ops;
  if (type == "f32") return gc::f32_ops;
  if (type == "f64") return gc::f64_ops;
  throw py::value_error("type: expected bf16, f16, f32 or f64, got " + type);
}

py::dtype sums(const std::string& type) { return py::dtype(type == "f64" ? "float64" : "float32"); }

// What ops have requested since the last call of count().
struct Requests {
  int64_t bytes = 0, products = 0;
} requests;

// Allocates buffers of the exact size, so that AddressSanitizer detects overruns, and fills them with NaN.
class HostWorkspace final : public gc::Workspace {
 public:
  explicit HostWorkspace(std::string type) : type_(std::move(type)) {}

  void allocate(gc::Buffer* buffers, int count) override {
    for (int i = 0; i < count; ++i) {
      memory_.emplace_back(std::malloc(buffers[i].bytes), &std::free);
      buffers[i].data = memory_.back().get();
      requests.bytes += buffers[i].bytes;
      if (!host_cuda::count_only) std::memset(buffers[i].data, 0xff, buffers[i].bytes);
    }
  }

  void multiply(const gc::Matrix& left, const gc::Matrix& right, void* out, int64_t ld) override {
    ++requests.products;
    if (host_cuda::count_only) return;
    if (type_ == "bf16") return multiply<gc::bf16>(left, right, out, ld);
    if (type_ == "f16") return multiply<gc::f16>(left, right, out, ld);
    if (type_ == "f64") return multiply<double>(left, right, out, ld);
    multiply<float>(left, right, out, ld);
  }

 private:
  template <class T>
  void multiply(const gc::Matrix& left, const gc::Matrix& right, void* out, int64_t ld) {
    using S = gc::Sum<T>;
    for (int64_t i = 0; i < left.rows; ++i)
      for (int64_t j = 0; j < right.cols; ++j) {
        S sum = 0;
        for (int64_t k = 0; k < left.cols; ++k)
          sum += gc::wide(static_cast<const T*>(left.data)[i * left.row_stride + k * left.col_stride]) *
                 gc::wide(static_cast<const T*>(right.data)[k * right.row_stride + j * right.col_stride]);
        static_cast<S*>(out)[i * ld + j] = sum;
      }
  }

  std::string type_;
  std::vector<std::unique_ptr<void, void (*)(void*)>> memory_;
};

gc::Arguments arguments(const py::array& input, const py::array& centers, const py::array& displacements,
                        const py::array& tau) {
  return {
      input.data(),     centers.data(), displacements.data(),   tau.data(), input.shape(0),
      centers.shape(0), input.shape(1), displacements.shape(0), nullptr,    centers.ndim() == 3 ? centers.shape(1) : 1};
}

py::array empty(const py::dtype& dtype, std::vector<py::ssize_t> shape) {
  py::array x(dtype, std::move(shape));
  if (!host_cuda::count_only) std::memset(x.mutable_data(), 0xff, x.nbytes());
  return x;
}

py::tuple logits_forward(const std::string& type, const py::array& input, const py::array& centers,
                         const py::array& displacements, const py::array& tau, bool need_slots, bool narrow) {
  const gc::Arguments a = arguments(input, centers, displacements, tau);
  py::array logits = empty(narrow ? input.dtype() : sums(type), {a.B, a.K});
  py::array slots = empty(py::dtype("uint8"), {need_slots ? a.B : 0, a.K});
  py::array center_rnorms = empty(sums(type), {a.m + 1, a.K}), input_rnorms = empty(sums(type), {a.B});
  HostWorkspace workspace(type);
  op_table(type).logits_forward(
      a,
      {logits.mutable_data(), need_slots ? static_cast<uint8_t*>(slots.mutable_data()) : nullptr,
       center_rnorms.mutable_data(), input_rnorms.mutable_data(), narrow},
      workspace);
  return py::make_tuple(logits, slots, center_rnorms, input_rnorms);
}

py::tuple logits_backward(const std::string& type, const py::array& grad, const py::array& input,
                          const py::array& centers, const py::array& displacements, const py::array& tau,
                          py::array logits, py::array slots, py::array center_rnorms, py::array input_rnorms,
                          bool need_input, bool need_centers, bool need_displacements, bool need_tau, bool narrow) {
  const gc::Arguments a = arguments(input, centers, displacements, tau);
  const auto gradient = [](bool needed, const py::dtype& dtype, std::vector<py::ssize_t> shape) {
    return needed ? empty(dtype, std::move(shape)) : py::array();
  };
  py::array df = gradient(need_input, input.dtype(), {a.B, a.d});
  py::array dw = gradient(need_centers, input.dtype(), {a.K, a.d});
  py::array dd = gradient(need_displacements, sums(type), {a.m, a.d}), dt = gradient(need_tau, sums(type), {1});
  HostWorkspace workspace(type);
  op_table(type).logits_backward(
      a, grad.data(),
      {logits.mutable_data(), static_cast<uint8_t*>(slots.mutable_data()), center_rnorms.mutable_data(),
       input_rnorms.mutable_data(), narrow},
      {need_input ? df.mutable_data() : nullptr, need_centers ? dw.mutable_data() : nullptr,
       need_displacements ? dd.mutable_data() : nullptr, need_tau ? dt.mutable_data() : nullptr},
      workspace);
  return py::make_tuple(df, dw, dd, dt);
}

// Optional arrays are None if absent.
const void* values(const py::object& x) { return x.is_none() ? nullptr : py::array(x).data(); }
void* data(const py::object& x) { return x.is_none() ? nullptr : py::array(x).mutable_data(); }

struct Loss {
  py::array target;
  py::object class_bias, weight, margin;
  int margin_kind, reduction;
  int64_t ignore_index;
  double label_smoothing;
  py::object input_coeffs, class_coeffs;

  gc::LossArguments arguments() const {
    return {static_cast<const int64_t*>(target.data()),
            values(class_bias),
            values(weight),
            values(margin),
            !margin.is_none() && py::array(margin).size() != 1,
            margin_kind,
            reduction,
            ignore_index,
            label_smoothing,
            values(input_coeffs),
            values(class_coeffs),
            input_coeffs.is_none() ? 1 : py::array(input_coeffs).shape(1)};
  }
};

// Scores are kept if there are slots, parked if there are scores without slots.
gc::LossResults results(const py::dict& x) {
  return {data(x["loss"]),
          data(x["lse"]),
          static_cast<bool*>(data(x["targets_in_range"])),
          data(x["scores"]),
          static_cast<uint8_t*>(data(x["slots"])),
          !x["scores"].is_none() && x["slots"].is_none(),
          data(x["center_rnorms"]),
          data(x["input_rnorms"]),
          data(x["row_stats"]),
          data(x["scalars"])};
}

bool cross_entropy_parks(const std::string& type, const py::array& input, const py::array& centers,
                         const py::array& displacements, const py::array& tau) {
  return op_table(type).cross_entropy_parks(arguments(input, centers, displacements, tau));
}

// scores: "kept", "parked" in memory like centers, or "recomputed".
py::dict cross_entropy_forward(const std::string& type, const py::array& input, const py::array& centers,
                               const py::array& displacements, const py::array& tau, const Loss& loss,
                               const std::string& scores) {
  const gc::Arguments a = arguments(input, centers, displacements, tau);
  const py::dtype sum = sums(type);
  const int64_t ld = gc::padded_rows(a.B);
  py::dict out;
  out["loss"] = empty(sum, {loss.reduction == 0 ? a.B : 1});
  out["lse"] = empty(sum, {a.B});
  out["targets_in_range"] = empty(py::dtype("bool"), {1});
  out["scores"] = scores == "kept"     ? py::object(empty(sum, {a.K, ld}))
                  : scores == "parked" ? py::object(empty(centers.dtype(), {a.K, a.d}))
                                       : py::none();
  out["slots"] = scores == "kept" ? py::object(empty(py::dtype("uint8"), {a.K, ld})) : py::none();
  out["center_rnorms"] = empty(sum, {a.vectors > 1 ? a.vectors : a.m + 1, a.K});
  out["input_rnorms"] = empty(sum, {a.B});
  out["row_stats"] = empty(sum, {loss.margin.is_none() ? 2 : 5, a.B});
  out["scalars"] = empty(sum, {2});
  HostWorkspace workspace(type);
  op_table(type).cross_entropy_forward(a, loss.arguments(), results(out), workspace);
  return out;
}

py::tuple cross_entropy_backward(const std::string& type, const py::object& grad_loss, const py::object& grad_lse,
                                 const py::array& input, const py::array& centers, const py::array& displacements,
                                 const py::array& tau, const Loss& loss, const py::dict& saved) {
  const gc::Arguments a = arguments(input, centers, displacements, tau);
  const auto like = [&](const py::object& x) {
    return x.is_none() ? py::object(py::none()) : py::object(empty(sums(type), {py::array(x).size()}));
  };
  const gc::LossResults from_forward = results(saved);
  py::array df = empty(input.dtype(), {a.B, a.d});
  py::array dw = from_forward.parked ? py::array(saved["scores"]) : empty(input.dtype(), {a.K * a.vectors, a.d});
  py::array dd = empty(sums(type), {a.m, a.d}), dt = empty(sums(type), {1});
  py::object db = like(loss.class_bias), dm = like(loss.margin), dx = like(loss.input_coeffs),
             dy = like(loss.class_coeffs);
  HostWorkspace workspace(type);
  op_table(type).cross_entropy_backward(a, loss.arguments(), {values(grad_loss), values(grad_lse)}, from_forward,
                                        {df.mutable_data(), dw.mutable_data(), dd.mutable_data(), dt.mutable_data()},
                                        {data(db), data(dm), data(dx), data(dy)}, workspace);
  return py::make_tuple(df, dw, dd, dt, dx, dy, db, dm);
}

// Overwrite `centers_grad` [K, d], whose rows begin with H, with the gradient of the centers of a summed loss without
// options, and return the partials of the displacements. The scores are gone.
template <class T>
py::array grad_centers_parked(const gc::Arguments& a, const Loss& loss, const py::dict& saved, const py::array& grad,
                              const py::array& t, bool cancelled, py::array& centers_grad) {
  const auto matrix = [&](const void* data, int64_t rows) {
    return gc::GlobalMatrix<T>{static_cast<const T*>(data), rows, a.d, a.d};
  };
  const gc::LossResults kept = results(saved);
  const gc::SoftmaxGrad<float> softmax{.grad_loss = static_cast<const float*>(grad.data()),
                                       .grad_lse = nullptr,
                                       .loss_stride = 0,
                                       .lse_stride = 0,
                                       .row_stats = static_cast<const float*>(kept.row_stats),
                                       .scalars = static_cast<const float*>(kept.scalars),
                                       .B = a.B,
                                       .classes = a.K,
                                       .first_class = 0,
                                       .target = loss.arguments().target,
                                       .bias = nullptr,
                                       .weight = nullptr,
                                       .has_margin = false,
                                       .is_mean = false,
                                       .ignore_index = loss.ignore_index,
                                       .smoothing = 0};
  const gc::GradSource<T> source{.p = {matrix(a.input, a.B), matrix(a.centers, a.K), matrix(a.displacements, a.m),
                                       static_cast<const float*>(a.tau)},
                                 .center_rnorms = static_cast<const float*>(kept.center_rnorms),
                                 .ldr = a.K,
                                 .input_rnorms = static_cast<const float*>(kept.input_rnorms),
                                 .scores = nullptr,
                                 .slots = nullptr,
                                 .score_class = 0,
                                 .score_row = 0,
                                 .grad = nullptr,
                                 .softmax = softmax,
                                 .scores_gone = true};
  const gc::GradCentersPlan plan = gc::plan_grad_centers<T>(a.B, a.K, a.d, a.m, true, true);
  if (!plan.stationary || plan.dim_parts != 1) throw std::runtime_error("expected a tile that takes all dims");
  const py::ssize_t tiles = gc::ceil_div(a.K, plan.classes);
  py::array partials = empty(py::dtype("float32"), {tiles, a.m, a.d});
  const int any = cancelled;
  T* out = static_cast<T*>(centers_grad.mutable_data());
  const gc::GradCentersInputs<T> inputs{source, out, a.d, static_cast<const float*>(t.data()), &any};
  const gc::GradCentersOutputs<T> outputs{out, static_cast<float*>(partials.mutable_data())};
  gc::launch_grad_centers<T>(nullptr, plan, true, inputs, outputs);
  return partials;
}

py::array grad_centers_parked_of_type(const std::string& type, const py::array& input, const py::array& centers,
                                      const py::array& displacements, const py::array& tau, const Loss& loss,
                                      const py::dict& saved, const py::array& grad, const py::array& t, bool cancelled,
                                      py::array centers_grad) {
  const gc::Arguments a = arguments(input, centers, displacements, tau);
  return type == "bf16" ? grad_centers_parked<gc::bf16>(a, loss, saved, grad, t, cancelled, centers_grad)
                        : grad_centers_parked<gc::f16>(a, loss, saved, grad, t, cancelled, centers_grad);
}

// Return the kernel for the gradient of the centers in bfloat16, its classes per tile and the blocks that share its
// dims.
py::tuple grad_centers_plan(int64_t B, int64_t K, int64_t d, int64_t m, bool parked) {
  const gc::GradCentersPlan plan = gc::plan_grad_centers<gc::bf16>(B, K, d, m, true, parked);
  return py::make_tuple(plan.wgmma ? "wgmma" : plan.stationary ? "mma" : "tiled", plan.classes, plan.dim_parts);
}

// Also returns the bytes of scratch memory, and the launches with those of the products.
py::tuple topk(const std::string& type, const py::array& input, const py::array& centers,
               const py::array& displacements, const py::array& tau, const py::object& class_bias, int64_t k,
               bool need_lse) {
  const gc::Arguments a = arguments(input, centers, displacements, tau);
  py::array found = empty(sums(type), {a.B, k}), classes = empty(py::dtype("int64"), {a.B, k});
  py::array slots = empty(py::dtype("uint8"), {a.B, k}), lse = empty(sums(type), {need_lse ? a.B : 0});
  HostWorkspace workspace(type);
  const auto before = requests;
  const int launches = host_cuda::launches;
  op_table(type).topk(a, {values(class_bias), k},
                      {found.mutable_data(), static_cast<int64_t*>(classes.mutable_data()),
                       static_cast<uint8_t*>(slots.mutable_data()), need_lse ? lse.mutable_data() : nullptr},
                      workspace);
  return py::make_tuple(found, classes, slots, lse, requests.bytes - before.bytes,
                        host_cuda::launches - launches + requests.products - before.products);
}

}  // namespace

PYBIND11_MODULE(GISTOPS_MODULE, m) {
  m.def("logits_forward", &logits_forward);
  m.def("logits_backward", &logits_backward);
  py::class_<Loss>(m, "Loss").def(
      py::init<py::array, py::object, py::object, py::object, int, int, int64_t, double, py::object, py::object>());
  m.def("cross_entropy_parks", &cross_entropy_parks);
  // Return the score and the slot that are parked in one float.
  m.def("parked", [](float z, unsigned slot) {
    const uint32_t bits = gc::parked(gc::can_be_parked(z), slot);
    return py::make_tuple(gc::parked_score(bits), gc::parked_slot(bits));
  });
  m.def("cross_entropy_forward", &cross_entropy_forward);
  m.def("cross_entropy_backward", &cross_entropy_backward);
  m.def("grad_centers_plan", &grad_centers_plan);
  m.def("grad_centers_parked", &grad_centers_parked_of_type);
  // Count launches, products and bytes of scratch memory; run none of them.
  m.def("count_only", [](bool on) { host_cuda::count_only = on; });
  // Return the counts since the last call.
  m.def("count", [] {
    py::dict counts;
    counts["launches"] = std::exchange(host_cuda::launches, 0);
    counts["products"] = requests.products, counts["bytes"] = requests.bytes;
    requests = {};
    return counts;
  });
  m.def("topk", &topk);
  m.def("set_thread_order", [](const std::string& order, unsigned seed) {
    using host_cuda::Order;
    host_cuda::set_order(order == "reverse"    ? Order::reverse
                         : order == "shuffled" ? Order::shuffled
                                               : Order::forward,
                         seed);
  });
  m.def("set_limits", [](int64_t cached, int64_t recomputed) {
    gc::limits = {.cached = cached, .logits = cached, .recomputed = recomputed};
  });
  m.def("reset_limits", [] { gc::limits = {}; });
  m.def("set_compute_capability", [](int value) { host_cuda::compute_capability = value; });
  m.def("set_multiprocessors", [](int count) { host_cuda::multiprocessors = count; });
  m.def("set_shared_memory", [](int bytes) { host_cuda::shared_at_most = bytes; });
}
