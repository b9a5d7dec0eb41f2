"""The tasks of a report: the columns that each reads, its scores, and its texts on the page."""

from narvl_plugin.report.subjects.base import Row, Scores, Subject, Table
from narvl_plugin.report.subjects.caption import CaptionSubject
from narvl_plugin.report.subjects.refcoco import RefcocoSubject
from narvl_plugin.report.subjects.snli_ve import SnliVeSubject
from narvl_plugin.report.subjects.vqa_gen import VqaGenSubject

SUBJECTS: dict[str, type[Subject]] = {
    subject.task: subject for subject in (CaptionSubject, VqaGenSubject, RefcocoSubject, SnliVeSubject)
}

__all__ = ["SUBJECTS", "Row", "Scores", "Subject", "Table"]
