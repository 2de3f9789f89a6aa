"""What is refused before long work, and what is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bitalloy.core.errors import BudgetError
from bitalloy.core.plans import Budget
from bitalloy.core.records import Settings
from bitalloy.pipeline.early import check_budget
from bitalloy.pipeline.prepare import Prepared, prepare
from bitalloy.samples.shapes import write_coco


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """A detector, and six labelled images of which only the first has boxes."""
    folder = tmp_path_factory.mktemp("early")
    labels = write_coco(folder / "scenes", count=6, size=160) / "instances.json"
    content = json.loads(labels.read_text())
    first = content["images"][0]["id"]
    content["annotations"] = [box for box in content["annotations"] if box["image_id"] == first]
    labels.write_text(json.dumps(content))
    return prepare("yolo11n-shapes", out=folder / "run", evaluate=[labels])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [Budget(min_agreement=0.98), Budget(max_drop={"agreement": 0.02, "AP50": 0.1})])
def test_metrics_are_known_whichever_image_is_drawn(prepared: Prepared, budget: Budget, seed: int) -> None:
    check_budget(prepared, budget, Settings(seed=seed))


def test_a_metric_that_there_is_not_is_refused_with_those_that_there_are(prepared: Prepared) -> None:
    with pytest.raises(BudgetError, match=r"'AP75'.*AP50-95, AP50, agreement"):
        check_budget(prepared, Budget(max_drop={"AP75": 0.1}), Settings())


def test_a_limit_on_agreement_needs_no_labels(tmp_path: Path) -> None:
    images = write_coco(tmp_path / "scenes", count=2, size=160) / "images"
    prepared = prepare("yolo11n-shapes", out=tmp_path / "run", data=images)
    check_budget(prepared, Budget(min_agreement=0.98), Settings())
