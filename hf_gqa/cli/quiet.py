"""What other packages say of themselves when they are imported and no user can act on; imported before any of them."""

import logging


logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # that the Hub has faster kernels
