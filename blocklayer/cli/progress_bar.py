"""A bar on the terminal that follows a job. In a file of its own because it loads rich."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

if TYPE_CHECKING:
    import blocklayer


async def show_bar(job: blocklayer.BackupJob, title: str) -> None:
    """Draw on standard error until the job has ended."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None)
        async for progress in job.progress():
            bar.update(task, completed=progress.current, total=progress.total)
