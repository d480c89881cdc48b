"""logitless: log-probabilities and preference losses straight from hidden states and the lm-head weight, without logits."""

from logitless.kernels.backends import available_backends, register_backend
from logitless.kernels.op import linear_logps, sequence_logps, shift
from logitless.kernels.plan import Plan, plan
from logitless.kernels.reference import reference_logps
from logitless.kernels.settings import Settings, current_settings, settings
from logitless.kernels.spec import HeadSpec
from logitless.kernels.stats import OUTPUTS, TokenStats

__version__ = "0.1.0"
