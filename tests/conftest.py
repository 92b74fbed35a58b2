"""For all tests: tiny models are fastest on one thread, and two workers share the machine."""

import torch


torch.set_num_threads(1)
