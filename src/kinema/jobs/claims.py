"""Whose job is claimed next. Keys take turns, so that no key holds up another, however many jobs it sends.

Of the waiting jobs, those of the highest priority come first; of these, those of the key with the fewest running jobs;
of such keys, the one whose jobs were claimed longest ago; of its jobs, the oldest. Keys are compared within a model.
``service/fair_order.py`` predicts this order; a test compares the two.

A claim is one UPDATE. It looks at the first job of each key alone, and goes from one to the next in an index, so a long
queue costs as little as a short one.
When other servers take exactly these jobs at the same moment, a second UPDATE looks at all.
Whether any job waits is asked before that: of many servers that hear of one job all but one find none.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any

from sqlalchemy import (
    CTE,
    BindParameter,
    ColumnElement,
    FromClause,
    Integer,
    Select,
    Subquery,
    Update,
    and_,
    bindparam,
    case,
    exists,
    func,
    insert,
    literal,
    literal_column,
    or_,
    select,
    true,
    tuple_,
    union_all,
    update,
)
from sqlalchemy.engine import Connection

from kinema.job import Job, JobStatus
from kinema.jobs.conditions import is_let_go, is_queued, is_running
from kinema.jobs.schema import job_from_row, jobs, key_turns
from kinema.jobs.store import PRIORITIES

_MODELS: BindParameter[str] = bindparam("models", expanding=True)
# Of these models, only jobs that have never lost a worker.
_SOUND_MODELS: BindParameter[str] = bindparam("sound_models", expanding=True)
_ALL_MODELS: BindParameter[str] = bindparam("all_models", expanding=True)
# Of these models, only jobs without LoRAs, or with those that stand beside the model.
_LORA_MODELS: BindParameter[str] = bindparam("lora_models", expanding=True)
_LORA_NEEDS: BindParameter[tuple[str, str]] = bindparam("lora_needs", expanding=True)
_CLAIMER: BindParameter[str] = bindparam("claimer")
# The workers that a job loses when its owner dies: 1 when they are one process, else 0.
_LOSSES_WITH_OWNER: BindParameter[int] = bindparam("losses_with_owner", type_=Integer)


class Claims:
    """The statements that claim a job."""

    def __init__(self, now: ColumnElement[float]) -> None:
        self._now = now

    def take(
        self,
        connection: Connection,
        models: Sequence[str],
        owner: str,
        lease_s: float,
        without_losses: Sequence[str],
        only_loras: Mapping[str, Collection[str]],
        owners_have_workers: bool,
    ) -> Job | None:
        """Claim the next job, and give its key the last turn, within the caller's transaction. See ``JobStore``."""
        asked: dict[str, Any] = {
            "models": models,
            "sound_models": without_losses,
            "all_models": [*models, *without_losses],
            "claimer": owner,
            "claimed_for_s": lease_s,
            "losses_with_owner": int(owners_have_workers),
        }
        if only_loras:
            asked["lora_models"] = list(only_loras)
            asked["lora_needs"] = [(model, needs) for model, these in only_loras.items() for needs in these]
        for statement in _claims(self._now, is_by_loras=bool(only_loras)):
            row = connection.execute(statement, asked).mappings().first()
            if row is not None:
                job = job_from_row(row)
                _end_turn(connection, job)
                return job
        return None


def may_take(connection: Connection, now: ColumnElement[float], models: Collection[str], owner: str) -> bool:
    """Whether a job of these models waits for whoever claims it, in a transaction that only reads."""
    return bool(connection.execute(_waits(now), {"all_models": list(models), "claimer": owner}).scalar_one())


def add_key(connection: Connection, model: str, key_id: str) -> None:
    """Note that the key has jobs of the model. The caller keeps others from doing so at the same time."""
    is_known = exists().where(key_turns.c.model == model, key_turns.c.key_id == key_id)
    new = select(literal(model), literal(key_id), literal(0)).where(~is_known)
    connection.execute(insert(key_turns).from_select(["model", "key_id", "turn"], new))


def _end_turn(connection: Connection, job: Job) -> None:
    """Put the job's key behind all others. If another claim does so at this moment, it need not wait for that."""
    mine, others = key_turns.alias("mine"), key_turns.alias("others")
    is_mine = and_(mine.c.model == job.request.model, mine.c.key_id == job.key_id)
    free = select(mine.c.key_id).where(is_mine).with_for_update(skip_locked=True)
    last = select(func.max(others.c.turn) + 1).where(others.c.model == job.request.model)
    turn = update(key_turns).where(key_turns.c.model == job.request.model, key_turns.c.key_id.in_(free))
    connection.execute(turn.values(turn=last.scalar_subquery()))


@lru_cache(maxsize=8)
def _claims(now: ColumnElement[float], *, is_by_loras: bool) -> tuple[Update, Update]:
    """The claim of the first jobs, and that of all. Built once: building them takes longer than running them.

    One that goes by LoRAs reads rows, beside the index.
    """
    return _claim(now, _firsts(now, is_by_loras), is_by_loras), _claim(now, None, is_by_loras)


@lru_cache(maxsize=4)
def _waits(now: ColumnElement[float]) -> Select[tuple[bool]]:
    is_free = or_(jobs.c.owner.is_(None), jobs.c.owner != _CLAIMER)
    again = exists().where(is_let_go(now), jobs.c.model.in_(_ALL_MODELS), is_free)
    return select(or_(exists().where(_is_new(jobs)), again))


def _claim(now: ColumnElement[float], firsts: CTE | None, is_by_loras: bool) -> Update:
    """The UPDATE that takes the first of the waiting jobs, or the first of ``firsts``."""
    line = jobs.alias("line")
    running, turns = _running(now), key_turns.alias("turns")
    source = line.outerjoin(running, _same(running, line)).outerjoin(turns, _same(turns, line))
    is_to_take = and_(or_(_is_new(line), _is_free_again(now, line)), _is_taken(line, is_by_loras))
    if firsts is not None:
        source = source.join(firsts, firsts.c.id == line.c.id)
        # PostgreSQL asks again when a row was changed before it was locked. In this form no index is used for that.
        is_to_take = case((is_to_take, 1), else_=0) == 1
    shares = func.coalesce(running.c.num_running, 0), func.coalesce(turns.c.turn, 0)
    first = (
        select(line.c.id)
        .select_from(source)
        .where(is_to_take)
        .order_by(line.c.rank, *shares, line.c.created_at, line.c.id)
        .limit(1)
        .with_for_update(of=line, skip_locked=True)
    )
    return (
        update(jobs)
        .where(jobs.c.id == first.scalar_subquery())
        .values(
            status=JobStatus.IN_PROGRESS.value,
            attempt=jobs.c.attempt + 1,
            # A job that still has an owner was not given back: its owner died.
            takeovers=jobs.c.takeovers + case((jobs.c.owner.is_(None), 0), else_=1),
            losses=jobs.c.losses + case((jobs.c.owner.is_(None), 0), else_=_LOSSES_WITH_OWNER),
            owner=_CLAIMER,
            lease_until=now + bindparam("claimed_for_s"),
        )
        .returning(jobs)
    )


def _firsts(now: ColumnElement[float], is_by_loras: bool) -> CTE:
    """The first queued job of each key and priority, and the jobs that wait for another attempt."""
    keys, one, again = _keys(), jobs.alias("first"), jobs.alias("again")
    is_of_key = and_(_is_in(one, keys), one.c.key_id == keys.c.key_id, _is_taken(one, is_by_loras))
    first = select(one.c.id).where(is_of_key).order_by(one.c.created_at, one.c.id).limit(1).correlate(keys)
    queued = select(first.scalar_subquery().label("id")).select_from(keys)
    is_free_again = and_(_is_free_again(now, again), _is_taken(again, is_by_loras))
    firsts = union_all(queued, select(again.c.id).where(is_free_again)).cte("firsts")
    # Read once. Before PostgreSQL has counted the rows of a new table, it would do so for each row that it joins.
    return firsts.prefix_with("MATERIALIZED", dialect="postgresql")


def _keys() -> CTE:
    """Each model, rank and key with queued jobs, once; and each model and rank without a key, at its end.

    A key is found from the one before by a step in the index. So the number of keys is what counts, not that of jobs.
    """
    models = select(key_turns.c.model).where(key_turns.c.model.in_(_ALL_MODELS)).distinct().subquery("models")
    each_rank = [literal_column(str(rank), Integer) for rank in range(len(PRIORITIES))]
    ranks = union_all(*(select(rank.label("rank")) for rank in each_rank)).subquery("ranks")
    lines = select(models.c.model, ranks.c.rank).select_from(models.join(ranks, true())).subquery("lines")
    one, following = jobs.alias("one"), jobs.alias("following")
    first = select(func.min(one.c.key_id)).where(_is_in(one, lines)).correlate(lines).scalar_subquery()
    keys = select(lines.c.model, lines.c.rank, first.label("key_id")).cte("keys", recursive=True)
    is_next = and_(_is_in(following, keys), following.c.key_id > keys.c.key_id)
    following_key = select(func.min(following.c.key_id)).where(is_next).correlate(keys).scalar_subquery()
    return keys.union_all(select(keys.c.model, keys.c.rank, following_key).where(keys.c.key_id.is_not(None)))


def _is_in(of: FromClause, lines: FromClause) -> ColumnElement[bool]:
    """The job is queued, and of this model and rank."""
    return and_(is_queued(of), of.c.model == lines.c.model, of.c.rank == lines.c.rank)


def _running(now: ColumnElement[float]) -> Subquery:
    """The number of running jobs of each key."""
    some = jobs.alias("some")
    key = (some.c.model, some.c.key_id)
    is_meant = and_(is_running(now, some), some.c.model.in_(_ALL_MODELS))
    return select(*key, func.count().label("num_running")).where(is_meant).group_by(*key).subquery("runs")


def _same(one: FromClause, other: FromClause) -> ColumnElement[bool]:
    return and_(one.c.model == other.c.model, one.c.key_id == other.c.key_id)


def _is_taken(of: FromClause, is_by_loras: bool) -> ColumnElement[bool]:
    if not is_by_loras:
        return true()
    return or_(of.c.loras == "", of.c.model.not_in(_LORA_MODELS), tuple_(of.c.model, of.c.loras).in_(_LORA_NEEDS))


def _is_new(of: FromClause) -> ColumnElement[bool]:
    return and_(is_queued(of), of.c.model.in_(_ALL_MODELS))


def _is_free_again(now: ColumnElement[float], of: FromClause) -> ColumnElement[bool]:
    is_lost_now = and_(of.c.owner.is_not(None), _LOSSES_WITH_OWNER > 0)
    is_sound = and_(of.c.model.in_(_SOUND_MODELS), of.c.losses == 0, ~is_lost_now)
    is_wanted = or_(of.c.model.in_(_MODELS), is_sound)
    is_free = or_(of.c.owner.is_(None), of.c.owner != _CLAIMER)
    return and_(is_let_go(now, of), of.c.model.in_(_ALL_MODELS), is_wanted, is_free)
