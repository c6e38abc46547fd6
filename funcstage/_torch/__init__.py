"""The private side of torch: which torches it is known of. Imported first, for its warning to come first."""

import torch

from funcstage._torch.versions import warn_if_newer

warn_if_newer(torch.__version__)
