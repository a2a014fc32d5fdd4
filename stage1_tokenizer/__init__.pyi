from .bottleneck import Bottleneck as Bottleneck, KLBottleneck as KLBottleneck
from .decoder import Decoder as Decoder, PixelDecoder as PixelDecoder, ViTDecoder as ViTDecoder
from .encoder import Encoder as Encoder, PatchTrunk as PatchTrunk, QFormerEncoder as QFormerEncoder, Trunk as Trunk
from .evaluation.judge import CaptionJudge as CaptionJudge
from .linear_path import LinearPath as LinearPath
from .predictor import LatentPredictor as LatentPredictor, Predictor as Predictor
from .prefixes import PrefixLengths as PrefixLengths
from .supervision import PictureSupervision as PictureSupervision, Supervision as Supervision
from .text.captioner import PrefixCaptioner as PrefixCaptioner
from .text.contrast import (
    MaxOverQueries as MaxOverQueries,
    SigmoidContrast as SigmoidContrast,
    SoftmaxContrast as SoftmaxContrast,
)
from .text.memory import CaptionMemory as CaptionMemory
from .text.readers import PrefixReader as PrefixReader, QueryReader as QueryReader
from .text.supervision import PrefixText as PrefixText
from .text.towers import (
    OpenClipTower as OpenClipTower,
    TextTower as TextTower,
    Tower as Tower,
    WholeVocabulary as WholeVocabulary,
)
from .text.vocabulary import CaptionVocabulary as CaptionVocabulary
from .text.words import WordTower as WordTower
from .tokenizer import Tokenizer as Tokenizer
from .training.adversarial import AdversarialLoss as AdversarialLoss, PatchDiscriminator as PatchDiscriminator
from .training.lit_adversarial import LitAdversarial as LitAdversarial
from .training.lit_tokenizer import LitTokenizer as LitTokenizer
from .training.losses import (
    ImageLoss as ImageLoss,
    Lite0Loss as Lite0Loss,
    LPIPSLoss as LPIPSLoss,
    PixelLoss as PixelLoss,
    StructureLoss as StructureLoss,
)
from .variants.alignment import FeatureAlignment as FeatureAlignment
from .variants.convolutional import ConvDecoder as ConvDecoder, ConvTrunk as ConvTrunk
from .variants.flow_decoder import FlowDecoder as FlowDecoder
from .variants.joined_trunks import JoinedTrunks as JoinedTrunks
from .variants.normed import NoiseBottleneck as NoiseBottleneck, NormBottleneck as NormBottleneck
from .variants.quantised import FSQBottleneck as FSQBottleneck, VQBottleneck as VQBottleneck
from .variants.rated import RateBottleneck as RateBottleneck
from .variants.timm_trunk import TimmTrunk as TimmTrunk
from .variants.titok import TiTokEncoder as TiTokEncoder
