"""What the linears of a block are for: the heads of queries, keys and values, the channels of an MLP.

Rows and columns go together in units: in attention a head of keys and values with the heads of queries that share it,
in an MLP one inner channel. A unit is rows of the linears that make something, and columns of the one that takes it up.
"""

from dataclasses import dataclass

from barber.errors import UserError
from barber.model.blocks import Block, Linear
from barber.model.families import Role
from barber.runtime.tensors import Tensor


@dataclass(frozen=True)
class Part:
    """The rows of a linear that serve one role, or the columns, where the role is to take up what others make.

    Args:
        linear: it may serve other roles with its other rows.
        units: how many units the rows or columns are.
        rows: where they are, in the linear; where roles take turns, in the rows of one unit. None: columns, all.
        interleaved: whether roles take turns.
    """

    linear: Linear
    units: int
    rows: slice | None
    interleaved: bool = False

    def by_unit(self, value: Tensor) -> Tensor:
        """This part of a weight, mask or score (O, I), or of a bias (O,), as a view with the units in front.

        Rows: (U, rows of a unit, I), or (U, rows of a unit) of a bias; of `torch.arange(O)` they are the rows' numbers.
        Columns: (U, O, columns of a unit).
        """
        if self.rows is None:
            return value.view(len(value), self.units, -1).transpose(0, 1)
        if self.interleaved:
            return value.view(self.units, -1, *value.shape[1:])[:, self.rows]
        return value[self.rows].view(self.units, -1, *value.shape[1:])


def part(block: Block, role: Role) -> Part | None:
    """The part of a block's linears that serves a role; None: the block has none, or not as a prunable linear.

    Raises:
        UserError: the heads of the model's config do not fit the linear.
    """
    linear = next((linear for linear in block.linears if role in linear.roles), None)
    if linear is None:
        return None
    num_rows, num_columns = linear.weight_OI.shape
    queries, groups, dim = block.heads.queries, block.heads.groups, block.heads.dim
    if role in ("output", "down", "shared_down"):
        return Part(linear, groups if role == "output" else num_columns, None)
    of_heads = {"query": queries * dim, "key": groups * dim, "value": groups * dim}
    lengths = [of_heads.get(one, num_rows // len(linear.roles)) for one in linear.roles]
    if sum(lengths) != num_rows:
        raise UserError(f"{linear.name} has {num_rows} rows, which {block.heads} of the model's config do not fill")
    place = linear.roles.index(role)
    units = groups if role in of_heads else lengths[place]
    begin, end = sum(lengths[:place]), sum(lengths[: place + 1])
    if linear.interleaved:
        return Part(linear, units, slice(begin // units, end // units), interleaved=True)
    return Part(linear, units, slice(begin, end))
