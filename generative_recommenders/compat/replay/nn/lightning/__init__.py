"""RePlay's Lightning side by its module paths, over `generative_recommenders.lightning`; the extra is imported on first
use."""

from generative_recommenders import lazy_exports

__all__ = ["LightningModule"]
__getattr__ = lazy_exports(__name__, {"module": ["LightningModule"]})
