"""Drafts without a model: what followed the last tokens where they stood before (prompt lookup, Saxena 2023).

With the text t_0 .. t_n, t_n its newest token, the longest run of at most :data:`LONGEST` tokens that ends at t_n is
looked for among the tokens before; of equally long ones the latest, ending at p, counts. Draft i is ``t_{p + i}``, and
where that is not written yet the text is taken to go on in circles, with period ``n - p``:

    d_i = t_{p + 1 + ((i - 1) mod (n - p))},   i = 1 .. G
"""

import jax.numpy as jnp

from snlp_jax.types import Array

LONGEST = 4
"""Most tokens that are compared."""
DRAFT_LEN = 7
"""Drafts a round where no number is asked for: eight rows cost a CPU or a GPU little more than one."""


def look_up(tokens_BS: Array, newest_B: Array, num_drafts: int) -> tuple[Array, Array]:
    """Drafts [B, G] behind the token at ``newest_B`` of each row, and how many of them there are, [B]: all, or none
    where the token stands nowhere before. Cost: a few comparisons of [B, S] integers."""
    index_S, row_B = jnp.arange(tokens_BS.shape[1]), jnp.arange(len(tokens_BS))
    is_same_BS = (index_S[None] < newest_B[:, None]) & (newest_B[:, None] > 0)
    length_BS = jnp.zeros_like(tokens_BS)
    for back in range(LONGEST):
        wanted_B = tokens_BS[row_B, jnp.maximum(newest_B - back, 0)]
        earlier_BS = jnp.pad(tokens_BS, ((0, 0), (back, 0)), constant_values=-1)[:, : tokens_BS.shape[1]]
        is_same_BS &= earlier_BS == wanted_B[:, None]
        length_BS += is_same_BS
    place_B = (length_BS * tokens_BS.shape[1] + index_S[None]).argmax(-1)
    count_B = jnp.where(length_BS[row_B, place_B] > 0, num_drafts, 0)
    period_B = jnp.maximum(newest_B - place_B, 1)
    source_BG = place_B[:, None] + 1 + jnp.arange(num_drafts)[None] % period_B[:, None]
    return tokens_BS[row_B[:, None], source_BG], count_B
