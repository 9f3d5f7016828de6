"""How often a unit of work was begun, in an actor. Its process has to import nothing else, which would take seconds."""

from collections import Counter


class Attempts:
    """An actor that counts how often a unit was begun.

    Ray Data starts a lost actor again and hands it the same unit, for ever. That is right where nodes come and go, and wrong for
    a unit that ends every process it is given to, as too large a batch may.
    """

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, int, int]] = Counter()

    def begin(self, what: str, series: int, shard: int) -> int:
        """Counts, and returns how often it was now."""
        self.counts[what, series, shard] += 1
        return self.counts[what, series, shard]
