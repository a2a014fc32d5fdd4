from .bottleneck import KLBottleneck as KLBottleneck
from .contract import (
    Bottleneck as Bottleneck,
    Decoder as Decoder,
    Encoder as Encoder,
    PixelDecoder as PixelDecoder,
    Trunk as Trunk,
)
from .decoder import ViTDecoder as ViTDecoder
from .encoder import PatchTrunk as PatchTrunk, QFormerEncoder as QFormerEncoder
from .linear_path import LinearPath as LinearPath
from .prefixes import PrefixLengths as PrefixLengths
from .text.captioner import PrefixCaptioner as PrefixCaptioner
from .text.memory import CaptionMemory as CaptionMemory
from .text.open_clip_tower import OpenClipTower as OpenClipTower, WholeVocabulary as WholeVocabulary
from .text.supervision import (
    MaxOverQueries as MaxOverQueries,
    PrefixReader as PrefixReader,
    PrefixText as PrefixText,
    QueryReader as QueryReader,
    SigmoidContrast as SigmoidContrast,
    SoftmaxContrast as SoftmaxContrast,
    TextTower as TextTower,
)
from .text.vocabulary import CaptionVocabulary as CaptionVocabulary
from .tokenizer import Tokenizer as Tokenizer
from .training.adversarial import AdversarialLoss as AdversarialLoss, PatchDiscriminator as PatchDiscriminator
from .training.lit_tokenizer import LitTokenizer as LitTokenizer
from .training.losses import (
    ImageLoss as ImageLoss,
    LPIPSLoss as LPIPSLoss,
    PixelLoss as PixelLoss,
    StructureLoss as StructureLoss,
)
from .variants.convolutional import ConvDecoder as ConvDecoder, ConvTrunk as ConvTrunk
from .variants.flow_decoder import FlowDecoder as FlowDecoder
from .variants.folded import FoldedBottleneck as FoldedBottleneck
from .variants.normed import NoiseBottleneck as NoiseBottleneck, NormBottleneck as NormBottleneck
from .variants.path_only import BlindEncoder as BlindEncoder, PathBottleneck as PathBottleneck
from .variants.quantised import FSQBottleneck as FSQBottleneck, VQBottleneck as VQBottleneck
from .variants.timm_trunk import TimmTrunk as TimmTrunk
from .variants.titok import TiTokEncoder as TiTokEncoder
