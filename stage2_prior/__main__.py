"""Command line of stage 2: python -m stage2_prior fit|validate|test|predict --config configs/stage2/NAME.yaml"""

from stage1_tokenizer.training.cli import run_cli
from stage2_prior.training.latent_data import PriorDataModule
from stage2_prior.training.lit_prior import LitPrior

if __name__ == "__main__":
    run_cli("stage2", LitPrior, PriorDataModule, "python -m stage2_prior")
