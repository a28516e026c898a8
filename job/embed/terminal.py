"""Progress of embeddings, and similar images as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from job.cluster import ranks
from job.embed.file import Block
from job.embed.run import Totals
from job.embed.search import Neighbour
from job.process.progress import Progress
from job.process.terminal import print_table


def show(blocks: Iterator[Block], images: int) -> Totals:
    """Count all rows, and show the progress.

    Args:
        blocks: rows of each batch.
        images: number of rows to expect.
    """
    totals = Totals()
    with Progress("embed", "images", images, is_shown=ranks.rank() == 0) as progress:
        for rows in blocks:
            totals.add(rows)
            progress.update(min(totals.images, images))
    return totals


def print_neighbours(query: str, neighbours: Sequence[Neighbour]) -> None:
    """Print the images that are similar to a query, the most similar first."""
    rows = [(f"{each.similarity:.4f}", ", ".join(each.labels), each.uri) for each in neighbours]
    print_table(
        ["similarity", "label", "image"], rows, title=f"{len(rows)} image(s) similar to {query}", right=["similarity"]
    )
