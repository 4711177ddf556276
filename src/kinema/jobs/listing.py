"""Pages of a key's jobs, by age: all of them, or those that somebody looks for.

The starred jobs, those without a video and those that have not ended are read off an index, however many jobs there
are. What no index has, as a model or a text in the prompt, is looked for in so many jobs at most; a page may then be
short, and says where the next one begins.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Select, literal, select, tuple_, union_all
from sqlalchemy.engine import Connection

from kinema.ids import JobId
from kinema.job import Job, JobStatus
from kinema.jobs.conditions import is_in_progress, is_queued, is_without_video
from kinema.jobs.schema import job_from_row, jobs

# Jobs that a page looks through for what no index has: some milliseconds.
_LOOKED_THROUGH = 1000


@dataclass(frozen=True, slots=True)
class Wanted:
    """The jobs that somebody looks for. ``text`` stands in the prompt, in whatever case; ``is_starred`` None: both."""

    statuses: Collection[JobStatus] = tuple(JobStatus)
    model: str | None = None
    text: str = ""
    is_starred: bool | None = None


@dataclass(frozen=True, slots=True)
class JobPage:
    """Jobs by age, whether more may follow, and the id behind which these are."""

    jobs: Sequence[Job]
    has_more: bool
    last_id: JobId | None


def read_page(
    connection: Connection, key_id: str, wanted: Wanted, after: JobId | None, limit: int, *, is_ascending: bool
) -> JobPage:
    """The first of the key's jobs after the given id (before it, if descending) that are wanted."""
    place = _Place(key_id, after, is_ascending)
    if _is_exact(wanted):
        ids = [row.id for row in connection.execute(_ids(place, wanted, limit + 1))]
        return _page(connection, ids[:limit], place, has_more=len(ids) > limit)
    looked_at = connection.execute(_looked_through(place, wanted)).all()
    text = wanted.text.casefold()
    found = [row.id for row in looked_at if _is_wanted(wanted, row.status, row.model, row.starred_at, row.prompt, text)]
    if len(found) > limit:
        return _page(connection, found[:limit], place, has_more=True)
    has_more = len(looked_at) == _LOOKED_THROUGH
    page = _page(connection, found, place, has_more=has_more)
    return JobPage(page.jobs, True, JobId(looked_at[-1].id)) if has_more else page


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a page begins, and in which order it goes on."""

    key_id: str
    after: JobId | None
    is_ascending: bool

    def rows(self, query: Select[tuple[str]], *named: tuple[ColumnElement[str], str]) -> Select[tuple[str]]:
        """The rows behind this place, of the key and of these values, in the order of an index of these columns.

        By the id alone, PostgreSQL would go through the jobs of all keys where it expects to meet the key's soon.
        """
        columns = [jobs.c.key_id, *(column for column, _ in named)]
        values = [literal(self.key_id), *(literal(value) for _, value in named)]
        begin, end = tuple_(*columns) >= tuple_(*values), tuple_(*columns) <= tuple_(*values)
        if self.after is not None:
            behind = tuple_(*columns, jobs.c.id), tuple_(*values, literal(self.after))
            begin, end = (behind[0] > behind[1], end) if self.is_ascending else (begin, behind[0] < behind[1])
        order = [*columns, jobs.c.id] if self.is_ascending else [column.desc() for column in (*columns, jobs.c.id)]
        return query.where(begin, end).order_by(*order)


def _is_exact(wanted: Wanted) -> bool:
    """Whether an index has what is wanted and no other job."""
    if wanted.text or wanted.model is not None or wanted.is_starred is False:
        return False
    is_any = set(wanted.statuses) == set(JobStatus)
    return is_any if wanted.is_starred else is_any or _is_found_by_status(wanted)


def _ids(place: _Place, wanted: Wanted, limit: int) -> Select[tuple[str]]:
    """The first ids by an index: of the starred jobs, of those without a video, of those that have not ended, or of
    all."""
    if wanted.is_starred:
        return place.rows(select(jobs.c.id).where(jobs.c.starred_at.is_not(None))).limit(limit)
    if not _is_found_by_status(wanted):
        return place.rows(select(jobs.c.id)).limit(limit)
    each = [_of_status(place, status).limit(limit).subquery() for status in wanted.statuses]
    together = union_all(*(select(one.c.id) for one in each)).subquery()
    by_age = together.c.id if place.is_ascending else together.c.id.desc()
    return select(together.c.id).order_by(by_age).limit(limit)


def _is_found_by_status(wanted: Wanted) -> bool:
    """Whether an index has these statuses: most jobs are completed, so that those need none."""
    return JobStatus.COMPLETED not in wanted.statuses


def _of_status(place: _Place, status: JobStatus) -> Select[tuple[str]]:
    """The ids with this status. Jobs that have not ended are few: they are sorted, and found in their own index."""
    if status.is_terminal:
        return place.rows(select(jobs.c.id).where(is_without_video()), (jobs.c.status, status.value))
    which = is_queued() if status is JobStatus.QUEUED else is_in_progress()
    # In this form the index of all of a key's jobs is not gone through.
    by_age, key_id = jobs.c.id.concat(""), jobs.c.key_id.concat("")
    query = select(jobs.c.id).where(which, key_id == place.key_id)
    if place.after is not None:
        query = query.where(by_age > place.after if place.is_ascending else by_age < place.after)
    return query.order_by(by_age if place.is_ascending else by_age.desc())


def _looked_through(place: _Place, wanted: Wanted) -> Select[tuple[str, str, str, float | None, str]]:
    """What a page is looked for in: the ids by an index, and what is asked of them."""
    ids = _ids(place, wanted, _LOOKED_THROUGH).subquery()
    by_age = jobs.c.id if place.is_ascending else jobs.c.id.desc()
    prompt = jobs.c.request["prompt"].as_string().label("prompt")
    columns = (jobs.c.id, jobs.c.status, jobs.c.model, jobs.c.starred_at, prompt)
    return select(*columns).where(jobs.c.id.in_(select(ids.c.id))).order_by(by_age)


def _is_wanted(wanted: Wanted, status: str, model: str, starred_at: float | None, prompt: str, text: str) -> bool:
    return (
        status in wanted.statuses
        and wanted.model in (None, model)
        and wanted.is_starred in (None, starred_at is not None)
        and text in prompt.casefold()
    )


def _page(connection: Connection, ids: Sequence[str], place: _Place, *, has_more: bool) -> JobPage:
    by_age = jobs.c.id if place.is_ascending else jobs.c.id.desc()
    query = select(jobs).where(jobs.c.id.in_(ids)).order_by(by_age)
    found = [job_from_row(row) for row in connection.execute(query).mappings()] if ids else []
    return JobPage(found, has_more, found[-1].id if found else None)
