"""What an earlier table of the same folder has measured and this one has not: it stays in the table.

``trips table`` measures accuracy and speed by separate options, often days apart; the second of two commands must not
take the columns of the first away.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

from trips.paper.tables import SPEED_FIGURES, TableResult

logger = logging.getLogger("trips")

_FIGURES = {"speed": SPEED_FIGURES, "accuracy": ("accuracy", "accuracy_sd", "accuracy_by_seed")}


def with_record(result: TableResult, folder: Path) -> TableResult:
    """A table with the speed, or accuracy, of the rows.json in a folder where it has none itself.

    A row takes over what stands there for a row of the same name and setting. What the figures were measured on is
    taken over with them, as a whole. A file that is no record of this table is named in the log and has no part in it.
    """
    path = folder / "rows.json"
    if not path.is_file():
        return result
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["number"] != result.number:
            raise ValueError(f"of table {record['number']}")
        kinds = [kind for kind in _FIGURES if getattr(result, kind) is None and record[kind] is not None]
        known = {row["name"]: (row["setting"], row["ours"]) for row in record["rows"]}
        rows, taken = [], False
        for row in result.rows:
            setting, ours = known.get(row.name, (None, {}))
            same = row.setting is not None and setting == _plain(row.setting)
            found = {name: ours[name] for kind in kinds for name in _FIGURES[kind] if same and name in ours}
            rows.append(dataclasses.replace(row, ours={**row.ours, **found}))
            taken = taken or bool(found)
        if not taken:
            return result
        told = {kind: str(record[kind]) for kind in kinds}
        conditions = tuple(dict.fromkeys((*map(str, record["measured_on"]), *result.measured_on)))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("%s: is no record of table %d (%s); nothing of it is kept", path, result.number, error)
        return result
    logger.info("%s: kept what it has of %s", path, " and ".join(kinds))
    return dataclasses.replace(result, rows=tuple(rows), measured_on=conditions, **told)


def _plain(setting: object) -> object:
    """A setting as JSON has it."""
    return json.loads(json.dumps(dataclasses.asdict(setting)))
