from .backbone import Backbone as Backbone, RotaryBackbone as RotaryBackbone
from .base import Prior as Prior
from .conditions import (
    CaptionWords as CaptionWords,
    ClassCondition as ClassCondition,
    Condition as Condition,
    NoCondition as NoCondition,
    TextTowerCondition as TextTowerCondition,
    WordSum as WordSum,
)
from .evaluation.generation import GenerationReport as GenerationReport
from .guidance import FallingGuidance as FallingGuidance, Guidance as Guidance, RisingGuidance as RisingGuidance
from .heads.amed import AMED as AMED
from .heads.base import Head as Head
from .heads.categorical import CategoricalHead as CategoricalHead
from .heads.ddpm import (
    DDIM as DDIM,
    DDPM as DDPM,
    DataTarget as DataTarget,
    NextLevelTarget as NextLevelTarget,
    NoiseTarget as NoiseTarget,
    VelocityTarget as VelocityTarget,
)
from .heads.diffusion import DiffusionHead as DiffusionHead
from .heads.flow import (
    CleanOutput as CleanOutput,
    FlowHead as FlowHead,
    NextLevelOutput as NextLevelOutput,
    NoiseOutput as NoiseOutput,
    VelocityOutput as VelocityOutput,
)
from .heads.mixture import MixtureHead as MixtureHead
from .heads.mse import MSEHead as MSEHead
from .heads.nets import (
    AdaLNNet as AdaLNNet,
    AddedConditionNet as AddedConditionNet,
    HeadNet as HeadNet,
    HoistedNet as HoistedNet,
)
from .heads.solvers import (
    AdamsBashforth as AdamsBashforth,
    DPMSolver2M as DPMSolver2M,
    Euler as Euler,
    EulerMaruyama as EulerMaruyama,
    Heun as Heun,
    Midpoint as Midpoint,
    MidTimeEuler as MidTimeEuler,
    Solver as Solver,
)
from .orders import (
    LearnedOrder as LearnedOrder,
    RandomOrder as RandomOrder,
    RasterOrder as RasterOrder,
    ReversedOrder as ReversedOrder,
    ScaleOrder as ScaleOrder,
    SetOrder as SetOrder,
    SpiralOrder as SpiralOrder,
    ZigzagOrder as ZigzagOrder,
)
from .pipeline import Pipeline as Pipeline
from .prior import CausalPrior as CausalPrior
from .training.latent_data import PriorDataModule as PriorDataModule, PriorImageModule as PriorImageModule
from .training.lit_prior import LitPrior as LitPrior
from .variants.autoencoder import AutoencoderLatents as AutoencoderLatents
from .variants.captioning import CaptioningPrior as CaptioningPrior
from .variants.frequencies import FrequencyLatents as FrequencyLatents
from .variants.frozen import FrozenPrior as FrozenPrior
from .variants.joint import JointPrior as JointPrior
from .variants.masked import (
    CosineShare as CosineShare,
    MaskedPrior as MaskedPrior,
    TruncatedNormalShare as TruncatedNormalShare,
)
from .variants.noise_extended import NoiseExtendedPrior as NoiseExtendedPrior
from .variants.patches import PatchLatents as PatchLatents
from .variants.pyramid import PyramidLatents as PyramidLatents
from .variants.released_titok import ReleasedTiTok as ReleasedTiTok
