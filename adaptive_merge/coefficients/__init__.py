"""Part 2 of a method, what is learned about the merge: rules, of which the linear coefficients are one kind."""

from adaptive_merge.merge.rule import Rule
from adaptive_merge.parts import kinds

globals().update(names := kinds(__name__, Rule))
__all__ = list(names)
