// float32 operands, on tensor cores that round them to tf32.
#include "operations.cuh"

namespace gistops::cuda {
const Operations tf32_operations = operations<MmaTf32>();
}
