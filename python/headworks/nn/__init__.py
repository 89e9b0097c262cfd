# SPDX-License-Identifier: Apache-2.0
"""Layers: token mixers with a parallel form, a recurrent form, and a state that joins the two.

Every mixer has ``forward(x, state=None, return_state=False, cu_seqlens=None)`` for a
sequence [B, S, d_model],
``step(x_t, state)`` for x_t [B, d_model], which updates the state in place, and
``init_state(batch_size)``. Feeding a sequence in pieces through the state equals feeding it whole.

KMeansRoutingAttention takes a sequence whole, then single steps. Three layers have a parallel form
alone: BiLevelRoutingAttention, CascadedGroupAttention and ContMix, of images, and MixtureOfHeads.
"""

from .bilevel_routing import BiLevelRoutingAttention
from .cascaded_group_attention import CascadedGroupAttention
from .contmix import ContMix
from .kmeans_routing import KMeansRoutingAttention, RoutingState
from .linear_attention import BasedLinearAttention
from .mixture_of_heads import MixtureOfHeads
from .norm import RMSNorm
from .short_conv import GatedShortConv
from .sliding_window import SlidingWindowAttention, WindowState

__all__ = [
    "BasedLinearAttention",
    "BiLevelRoutingAttention",
    "CascadedGroupAttention",
    "ContMix",
    "GatedShortConv",
    "KMeansRoutingAttention",
    "MixtureOfHeads",
    "RMSNorm",
    "RoutingState",
    "SlidingWindowAttention",
    "WindowState",
]
