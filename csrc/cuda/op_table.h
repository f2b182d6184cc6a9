// What the binding calls: the operators for each type of operands, on pointers. No CUDA and no torch header here.
#pragma once
#include <cstdint>

namespace gistops::cuda {

// Contiguous rows. Sums are float, and double for double.
struct Arguments {
  const void *input, *centers, *displacements;  // [B, d], [K, d], [m, d], of one type
  const void* tau;                              // one sum
  int64_t B, K, d, m;
  void* stream;
};

struct Results {
  void* logits;         // [B, K] sums
  uint8_t* slots;       // [B, K]
  void* center_rnorms;  // [M, K] sums
  void* input_rnorms;   // [B] sums
};

// Null where not needed.
struct Gradients {
  void *input, *centers;      // as the arguments
  void *displacements, *tau;  // sums
};

// Element (i, j) lies at data + i row + j col elements of the operands' type; one of the two strides is 1.
struct Matrix {
  const void* data;
  int64_t rows, cols, row, col;
};

struct Piece {
  int64_t bytes;
  void* data;
};

// Scores and weights lie class-major, in rows of B rounded up to whole vectors of every type.
constexpr int64_t padded_rows(int64_t B) { return (B + 15) / 16 * 16; }

// Lends device memory until the call ends, and multiplies large matrices.
class Workspace {
 public:
  virtual ~Workspace() = default;
  // Fills in `data` of each piece, at a multiple of 256 bytes.
  virtual void scratch(Piece* pieces, int count) = 0;
  // left right -> out, sums in rows of length ld.
  virtual void multiply(const Matrix& left, const Matrix& right, void* out, int64_t ld) = 0;
};

// What a cross-entropy takes beside the scores' arguments. Null where there is none.
struct LossArguments {
  const int64_t* target;                     // [B]
  const void *class_bias, *weight, *margin;  // [K], [K], [K] or [1], sums
  bool each_margin;                          // a margin for each class
  int margin_kind, reduction;                // 0 logit, 1 cosine, 2 angle; 0 none, 1 mean, 2 sum
  int64_t ignore_index;
  double label_smoothing;
};

struct LossResults {
  void *loss, *lse;      // [B] or [1], [B]
  bool* inside;          // [1]: whether all targets are in range
  void* scores;          // [K, padded_rows(B)] sums, or null: not kept
  uint8_t* slots;        // likewise
  void* center_rnorms;   // [M, K]
  void* input_rnorms;    // [B]
  void *rows, *scalars;  // [2, B], or [5, B] with a margin; [2]
};

struct LossGrads {
  const void *loss, *lse;  // as the results, or null
};

// All throw std::runtime_error with the kernel's name and CUDA's words where a launch fails.
struct Operations {
  void (*forward)(const Arguments&, const Results&, Workspace&);
  void (*backward)(const Arguments&, const void* grad, const Results& saved, const Gradients&, Workspace&);
  void (*loss_forward)(const Arguments&, const LossArguments&, const LossResults&, Workspace&);
  // class_bias [K], margin [K] or [1]: their gradients, or null
  void (*loss_backward)(const Arguments&, const LossArguments&, const LossGrads&, const LossResults& saved,
                        const Gradients&, void* class_bias, void* margin, Workspace&);
};

extern const Operations bf16_operations, f16_operations, f32_operations, f64_operations;

}  // namespace gistops::cuda
