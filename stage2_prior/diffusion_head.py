"""The head of Li et al. 2024, "Autoregressive image generation without vector quantization" (MAR): a small diffusion
model on the cosine schedule as the loss of one latent. The flow head's predecessor and control.

L = E || target - net(x_t | t, cond) ||^2 with t uniform, stratified over the draws of one latent, which share one
condition. Sampling is ancestral (DDPM, 100 steps) with a temperature on every draw, or DDIM. The variance of a step is
fixed; MAR's learned one only interpolates between the two bounds that `DDPM.variance` names.

Letters: M rows, C latent channels, D condition width, S draws of t.
"""

import torch
from torch import Tensor

from stage1_tokenizer.flow import stratified_uniform
from stage2_prior.diffusion import DDPM, NoiseTarget, Target, alpha_sigma, alpha_sigma_at
from stage2_prior.head_nets import HeadNet
from stage2_prior.heads import Head, HeadError, Plan, guided_rows
from stage2_prior.samplers import Solver


class DiffusionHead(Head):
    """Diffusion loss of one latent.

    Args:
        net: the network, with latent width C and condition width D.
        target: what the network is asked for (None: the noise).
        sampler: DDPM or DDIM with its grid (None: DDPM x 100).
        draws: draws of t per latent and step.
    """

    def __init__(self, net: HeadNet, target: Target | None = None, sampler: Solver | None = None, draws: int = 4):
        super().__init__()
        if draws < 1:
            raise HeadError(f"got draws={draws}, wanted at least 1 draw of t per latent.")
        self.net, self.latent_dim, self.cond_dim = net, net.latent_dim, net.cond_dim
        self.target: Target = NoiseTarget() if target is None else target
        self.sampler: Solver = DDPM() if sampler is None else sampler
        self.draws = draws

    def loss(self, cond: Tensor, target: Tensor, generator: torch.Generator | None = None) -> Tensor:
        x = target.float()  # (M,C)
        t = stratified_uniform(len(x), self.draws, generator, x.device)  # (S,M)
        alpha, sigma = (a.unsqueeze(-1) for a in alpha_sigma(t))  # (S,M,1)
        noise = torch.randn(self.draws, *x.shape, generator=generator, device=x.device)  # (S,M,C)
        answer = self.net(alpha * x + sigma * noise, self.net.time(t), self.net.condition(cond)).float()
        return (answer - self.target.target(x, noise, alpha, sigma)).square().mean(dim=(0, -1))  # (M,)

    def plan(self, steps: int | None = None) -> Plan:
        sampler = self.sampler if steps is None else self.sampler.with_evaluations(steps)
        times = sampler.times()
        rows = self.net.time(torch.tensor(times, device=self.net.out.weight.device))  # (T,·)
        return Plan(sampler, dict(zip(times, rows, strict=True)), len(times))

    def sample(
        self,
        cond: Tensor,
        uncond: Tensor | None = None,
        guidance: float = 1.0,
        *,
        interval: tuple[float, float] = (0.0, 1.0),
        plan: Plan | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        plan = self.plan() if plan is None else plan
        rows = guided_rows(cond, uncond, guidance)
        condition = self.net.condition(rows)  # (M,·) or, guided, (2M,·)
        m, guided = len(cond), len(rows) > len(cond)

        def denoise(x: Tensor, t: float) -> Tensor:
            time = plan.table[t]
            if guided and interval[0] <= t <= interval[1]:
                answer_c, answer_u = self.net(torch.cat([x, x]), time, condition).float().chunk(2)
                answer = torch.lerp(answer_u, answer_c, guidance)
            else:
                answer = self.net(x, time, condition[:m]).float()
            return self.target.data(x, answer, *alpha_sigma_at(t))

        noise = torch.randn(m, self.latent_dim, generator=generator, device=cond.device) * temperature
        assert plan.solver is not None, "a diffusion head's plan has a sampler"
        return plan.solver(denoise, noise, generator, temperature)
