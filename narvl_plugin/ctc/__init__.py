"""The mathematics of Query-CTC in plain torch: loss, alignment and search over the queries' label distributions."""

from narvl_plugin.ctc.acceptors import elements_of, set_of
from narvl_plugin.ctc.alignment import (
    Alignment,
    best_states,
    score_targets,
    state_posteriors,
    token_posteriors,
    total_scores,
    viterbi,
)
from narvl_plugin.ctc.answer_trie import AnswerList, Trie, build_trie, score_candidates, score_trie
from narvl_plugin.ctc.beam import BeamAndGreedy, beam_outputs, constrained_outputs, prefix_beam_search
from narvl_plugin.ctc.bigrams import bigram_f1
from narvl_plugin.ctc.box_sets import BoxSets
from narvl_plugin.ctc.collapse import (
    Collapsed,
    Hypothesis,
    Paths,
    SlotKind,
    collapse,
    greedy,
    hypotheses_of,
    slot_kinds,
)
from narvl_plugin.ctc.constrained import Greedy, Said, constrain, constrained_search
from narvl_plugin.ctc.constraints import Automaton, LengthRange, OutputConstraint, one_of, sequence_of
from narvl_plugin.ctc.host import to_host
from narvl_plugin.ctc.languages import PathGraph, best_path_of, label_posteriors, language_loss, path_entropy
from narvl_plugin.ctc.lattice import TargetsDoNotFit, build_lattice, min_queries
from narvl_plugin.ctc.loss import log_sum_exp, query_ctc_any_loss, query_ctc_loss
from narvl_plugin.ctc.ngrams import NgramAutomaton, NgramConstraint, count_ngrams
from narvl_plugin.ctc.outputs import Outputs, Scored
from narvl_plugin.ctc.sampling import (
    expected_output_score,
    expected_score,
    outputs_of,
    quasi_random_paths,
    sample_paths,
)
from narvl_plugin.ctc.trees import Tree, tree_automaton, tree_language, tree_loss

__all__ = [
    "total_scores",
    "to_host",
    "state_posteriors",
    "constrain",
    "build_lattice",
    "best_states",
    "Greedy",
    "BeamAndGreedy",
    "Alignment",
    "AnswerList",
    "Automaton",
    "Collapsed",
    "Hypothesis",
    "OutputConstraint",
    "LengthRange",
    "BoxSets",
    "NgramAutomaton",
    "NgramConstraint",
    "count_ngrams",
    "Outputs",
    "PathGraph",
    "Paths",
    "Said",
    "Scored",
    "SlotKind",
    "TargetsDoNotFit",
    "Tree",
    "Trie",
    "beam_outputs",
    "best_path_of",
    "bigram_f1",
    "build_trie",
    "collapse",
    "constrained_search",
    "elements_of",
    "expected_output_score",
    "expected_score",
    "greedy",
    "hypotheses_of",
    "constrained_outputs",
    "label_posteriors",
    "language_loss",
    "log_sum_exp",
    "one_of",
    "outputs_of",
    "path_entropy",
    "prefix_beam_search",
    "min_queries",
    "query_ctc_any_loss",
    "query_ctc_loss",
    "sample_paths",
    "score_candidates",
    "score_targets",
    "score_trie",
    "sequence_of",
    "set_of",
    "quasi_random_paths",
    "token_posteriors",
    "slot_kinds",
    "tree_automaton",
    "tree_language",
    "tree_loss",
    "viterbi",
]
