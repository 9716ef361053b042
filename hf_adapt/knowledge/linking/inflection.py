"""Regular forms of English words, for names that a text inflects."""

from __future__ import annotations

import re

_IRREGULAR = {
    "child": ("children",),
    "foot": ("feet",),
    "goose": ("geese",),
    "louse": ("lice",),
    "man": ("men",),
    "mouse": ("mice",),
    "ox": ("oxen",),
    "person": ("people", "persons"),
    "tooth": ("teeth",),
    "woman": ("women",),
    "be": ("am", "is", "are", "was", "were", "been", "being"),
    "have": ("has", "had", "having"),
    "do": ("does", "did", "done", "doing"),
    "go": ("goes", "went", "gone", "going"),
}
_ENDINGS = (  # what the word ends with, how much of that goes, what comes instead
    (re.compile(r"man$"), 2, "en"),  # policeman, policemen
    (re.compile(r"sis$"), 2, "es"),  # thesis, theses
    (re.compile(r"(?:rion|enon)$"), 2, "a"),  # criterion, criteria
    (re.compile(r"(?:[lr]|ea|oa)f$"), 1, "ves"),  # half, halves
    (re.compile(r"(?:n|l|w)ife$"), 2, "ves"),  # knife, knives
)
_ONE_SYLLABLE = re.compile(r"[^aeiou]*[aeiou][bdgklmnprtvz]$")

ENGLISH_FUNCTION_WORDS = frozenset(
    """a about above after again all am an and any are as at be been before being below between both
    but by can could did do does doing down during each few for from further had has have having he
    her here hers herself him himself his how i if in into is it its itself just me more most must
    my myself no nor not now of off on once only or other our ours ourselves out over own same shall
    she should so some such than that the their theirs them themselves then there these they this
    those through to too under until up very was we were what when where which while who whom why
    will with would you your yours yourself yourselves""".split()
)
"""Words that are seldom meant as an entity: `EntityLinker(graph, stop_surfaces=…)`."""


def english_forms(word: str) -> list[str]:
    """Plural, third person, past and gerund of an English word by the regular rules.

    A word that is no noun or verb gets forms that no text uses, which do no harm. A few frequent
    irregular words are known; give others as names of the entity.

    Args:
        word: One word in small letters; others get no forms.

    Example:
        >>> english_forms("therapy")
        ['therapies', 'therapied', 'therapying']
        >>> english_forms("stop")
        ['stops', 'stopped', 'stopping']
    """
    if len(word) < 3 or not (word.isascii() and word.isalpha() and word.islower()):
        return list(_IRREGULAR.get(word, ()))
    if word in _IRREGULAR:
        return list(_IRREGULAR[word])
    for ending, cut, instead in _ENDINGS:
        if ending.search(word):
            return [word[:-cut] + instead, word + "s"]
    if word.endswith("y") and word[-2] not in "aeiou":
        return [word[:-1] + "ies", word[:-1] + "ied", word + "ing"]
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return [word + "es", word + "ed", word + "ing"]
    if word.endswith("e"):
        return [word + "s", word + "d", word[:-1] + "ing"]
    doubled = word + word[-1] if _ONE_SYLLABLE.match(word) else word
    return [word + "s", doubled + "ed", doubled + "ing"]
