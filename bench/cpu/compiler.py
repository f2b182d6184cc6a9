"""The imports of torch.compile and its tests of the processor, done once for all forks of a process.

Without it, the forks work too, but each takes some seconds longer.
"""

import torch._inductor.compile_fx  # noqa: F401
from torch._inductor.cpu_vec_isa import valid_vec_isa_list

valid_vec_isa_list()
