"""How the MoE family is made: the tiny family's text and steps, with a Qwen3-MoE in place of the Llama."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from meswitch.demo.tiny import TinySettings
from meswitch.demo.training import Training

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class MoeSettings(TinySettings):
    """What the MoE family is made of: 8.3 million parameters, 7.1 of them in MoE experts.

    `intermediate`: of one MoE expert. An eighth of the MoE experts is chosen for a token, as in OLMoE.
    """

    hidden: int = 192
    intermediate: int = 96
    moe_experts: int = 32
    chosen: int = 4  # MoE experts a token
    balance: float = 0.01  # the share of the load-balancing loss
    base: Training = Training(((64, 16, 700), (512, 2, 160)), rate=1.5e-3, embedding=20.0, decay=0.1)
    tune: Training = Training(((64, 16, 110), (128, 8, 40)), rate=5e-4, embedding=10.0)

    def _config(self, tokenizer: PreTrainedTokenizerFast) -> Any:
        from transformers import Qwen3MoeConfig

        return Qwen3MoeConfig(
            **self._shape(tokenizer) | {"head_dim": self.hidden // self.heads},
            moe_intermediate_size=self.intermediate,
            num_experts=self.moe_experts,
            num_experts_per_tok=self.chosen,
            norm_topk_prob=True,
            router_aux_loss_coef=self.balance,
        )
