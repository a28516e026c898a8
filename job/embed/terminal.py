"""Progress of embeddings, and similar images as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from job import redact
from job.cluster import ranks
from job.embed.embedder import Embedder
from job.embed.file import Block
from job.embed.run import Totals
from job.embed.search import Neighbour, embedding_files, nearest, query_vector
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


def print_similar(embedder: Embedder, query: str, output: str, k: int) -> None:
    """Search the files of ``output`` for the images that are similar to the one at ``query``, and print them.

    Raises:
        ConfigError: there are no embeddings of this backbone.
        DataError: a file is damaged, or the query is no readable image.
    """
    files = embedding_files(output, embedder)
    (neighbours,) = nearest(query_vector(embedder, query)[None], files, k)
    print_neighbours(redact.identity(query), neighbours)


def print_neighbours(query: str, neighbours: Sequence[Neighbour]) -> None:
    """Print the images that are similar to a query, the most similar first."""
    rows = [(f"{each.similarity:.4f}", ", ".join(each.labels), each.uri) for each in neighbours]
    print_table(
        ["similarity", "label", "image"], rows, title=f"{len(rows)} image(s) similar to {query}", right=["similarity"]
    )
