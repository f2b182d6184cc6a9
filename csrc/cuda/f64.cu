// The operators, of float64 operands.
#include "operations.cuh"

namespace gistops::cuda {
const Operations f64_operations = operations<double>();
}
