// The interface between the binding and the kernels: the ops for each type of operands, on pointers. Includes
// neither CUDA nor torch headers.
#pragma once
#include <cstdint>
#include <cstdlib>

namespace gistops::cuda {

// All tensors are contiguous. "Sums" are double for double operands, else float.
struct Arguments {
  const void *input, *centers, *displacements;  // [B, d], [K, d] or [K, vectors, d], [m, d], of one type
  const void* tau;                              // [1] sum
  int64_t B, K, d, m;
  void* stream;
  int64_t vectors = 1;  // sub-centers per class, in a loss; more than one only if m is 0
};

struct LogitsResults {
  void* logits;         // [B, K] sums, or of the operands' type if `narrow`
  uint8_t* slots;       // [B, K]; null: not needed
  void* center_rnorms;  // [M, K] sums
  void* input_rnorms;   // [B] sums
  bool narrow;
};

// Gradients of the arguments; null where not needed.
struct Gradients {
  void *input, *centers;      // of the operands' type
  void *displacements, *tau;  // sums
};

// A matrix whose element (i, j) lies at data + i row_stride + j col_stride, in elements of the operands' type. One of
// the strides is 1.
struct Matrix {
  const void* data;
  int64_t rows, cols, row_stride, col_stride;
};

struct Buffer {
  int64_t bytes;
  void* data;
};

// Return the length of the rows of class-major tensors (scores, slots, weights): B rounded up to whole vectors of every
// type.
constexpr int64_t padded_rows(int64_t B) { return (B + 15) / 16 * 16; }

// Lends device memory until the call ends, and multiplies large matrices.
class Workspace {
 public:
  virtual ~Workspace() = default;
  // Set `data` of each buffer, to a multiple of 256 bytes.
  virtual void allocate(Buffer* buffers, int count) = 0;
  // Write left x right to out, as sums in rows of length ld.
  virtual void multiply(const Matrix& left, const Matrix& right, void* out, int64_t ld) = 0;
};

// Arguments of a cross-entropy beyond those of the logits. Vectors are sums, null where absent.
struct LossArguments {
  const int64_t* target;                     // [B]
  const void *class_bias, *weight, *margin;  // [K], [K], [K] or [1]
  bool margin_per_class;                     // margin is [K]
  int margin_kind, reduction;                // 0 logit, 1 cosine, 2 angle; 0 none, 1 mean, 2 sum
  int64_t ignore_index;
  double label_smoothing;
  // Coefficients of rotations [B, slots] and [2, slots, K], as sums; null: none. m and vectors are then 0 and 1.
  const void *input_coeffs = nullptr, *class_coeffs = nullptr;
  int64_t rotation_slots = 1;
};

struct LossResults {
  void *loss, *lse;           // [B] or [1]; [B]
  bool* targets_in_range;     // [1]
  void* scores;               // [K, padded_rows(B)] sums; null: not kept for the backward
  uint8_t* slots;             // in the shape of scores; null: not kept
  bool parked;                // instead, scores is the memory of the gradient of the centers, which holds the slots too
  void* center_rnorms;        // [M, K]; rotations [1, K]
  void* input_rnorms;         // [B]
  void *row_stats, *scalars;  // [2, B], or [5, B] with a margin; [2]: as in softmax_grad.cuh
};

// Gradients of the results; null where there is none.
struct LossOutputGrads {
  const void *loss, *lse;
};

// Gradients of the vectors of LossArguments; null where not needed. Those of coefficients are always needed.
struct LossGradients {
  void *class_bias, *margin;  // [K]; [K] or [1]
  void *input_coeffs = nullptr, *class_coeffs = nullptr;
};

// The most results of `topk` per row, and the most classes.
constexpr int64_t kMostBest = 128, kMostTopkClasses = int64_t{1} << 24;

struct TopkArguments {
  const void* class_bias;  // [K] sums, or null
  int64_t k;               // at most K and kMostBest
};

struct TopkResults {
  void* values;      // [B, k] sums
  int64_t* classes;  // [B, k]
  uint8_t* slots;    // [B, k]
  void* lse;         // [B] sums, or null
};

// Every function throws std::runtime_error with the kernel's name and CUDA's message if a launch fails.
struct OpTable {
  void (*logits_forward)(const Arguments&, const LogitsResults&, Workspace&);
  // grad has the type of saved.logits.
  void (*logits_backward)(const Arguments&, const void* grad, const LogitsResults& saved, const Gradients&, Workspace&);
  // Return true if the scores of a loss can be parked, whatever GISTOPS_CUDA_CENTERS_TILE asks for. Of the arguments it
  // reads pointers and sizes alone.
  bool (*cross_entropy_parks)(const Arguments&);
  void (*cross_entropy_forward)(const Arguments&, const LossArguments&, const LossResults&, Workspace&);
  void (*cross_entropy_backward)(const Arguments&, const LossArguments&, const LossOutputGrads&,
                                 const LossResults& saved, const Gradients&, const LossGradients&, Workspace&);
  void (*topk)(const Arguments&, const TopkArguments&, const TopkResults&, Workspace&);
};

// Return the kernel that GISTOPS_CUDA_CENTERS_TILE asks for to compute the gradient of the centers: 0 for the tiled
// one, 64 or 128 for the classes per tile of the stationary one, by wgmma if the device has it, -1 for the choice by
// the sizes. A loss parks its scores where they fit for 64 and 128, never for 0, and with many classes for -1.
inline int asked_centers_tile() {
  const char* asked = std::getenv("GISTOPS_CUDA_CENTERS_TILE");
  return asked ? std::atoi(asked) : -1;
}

// Return true if GISTOPS_CUDA_FUSED_LOGITS is 1, which asks for the logits of one kernel where that is possible.
inline bool fused_logits_are_asked() {
  const char* asked = std::getenv("GISTOPS_CUDA_FUSED_LOGITS");
  return asked && std::atoi(asked) == 1;
}

extern const OpTable bf16_ops, f16_ops, f32_ops, f64_ops;

}  // namespace gistops::cuda
