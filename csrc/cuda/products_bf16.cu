// The operators around PyTorch's products, of bfloat16 operands.
#include "product_operations.cuh"

namespace gistops::cuda {
const ProductOperations bf16_products = product_operations<bf16>();
}
