"""The tasks of a report: the columns that each reads, its scores, and its texts on the page."""

from narvl_plugin.report.subjects.base import Row, Scores, Table, TaskReport
from narvl_plugin.report.subjects.caption import CaptionReport
from narvl_plugin.report.subjects.refcoco import RefcocoReport
from narvl_plugin.report.subjects.regions import RegionsReport
from narvl_plugin.report.subjects.scene_graph import SceneGraphReport
from narvl_plugin.report.subjects.scene_tree import SceneTreeReport
from narvl_plugin.report.subjects.snli_ve import SnliVeReport
from narvl_plugin.report.subjects.vqa_gen import VqaGenReport

TASK_REPORTS: dict[str, type[TaskReport]] = {
    subject.task: subject
    for subject in (
        CaptionReport,
        VqaGenReport,
        RefcocoReport,
        SnliVeReport,
        RegionsReport,
        SceneGraphReport,
        SceneTreeReport,
    )
}

__all__ = ["TASK_REPORTS", "Row", "Scores", "TaskReport", "Table"]
