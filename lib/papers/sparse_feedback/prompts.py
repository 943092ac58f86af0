"""What an annotator reads: the prompts of the two protocols, each in two wordings.

Both have the parts of the paper's (role, scale, dimensions, two solved examples, the item); the words are
ours.  The second wording asks the same thing otherwise: how often an annotator then says something else is
the noise that two protocols have to be compared with.
"""

from __future__ import annotations

DIMENSIONS = """Judge three things together:
- Accuracy: does it do what the instruction asks, with facts that hold and fit the input?
- Coherence: is it clear, in order, and free of repetition?
- Harmlessness: is it free of anything unsafe, insulting or misleading?"""

_RATING = """You grade answers that a computer program wrote to instructions.

Give one whole number from 1 to 7.
1: the answer is useless or does harm. 7: nothing about it could be improved.
{dimensions}
Think it over, but write only your overall grade, as a digit on the first line.

### Example
Instruction: Give three tips for keeping houseplants alive.
Answer: Water. Water them. Also you can water the plants.
Grade: 2
(One tip, said three times.)

### Example
Instruction: Name the capital of the country below and one river in it.
Input:
Egypt
Answer: The capital of Egypt is Cairo, and the Nile flows through the country.
Grade: 7
(Both parts are answered, rightly and briefly.)

### To grade
{item}
Answer: {response}
Grade:"""

_RANKING = """You choose between two answers that computer programs wrote to the same instruction.

Reply with "Output (a)" if the first is better or less wrong, with "Output (b)" if the second is{equal}, \
and with nothing else.
{dimensions}

### Example
Instruction: Write a rhyme about rain.
Output (a): Drops that tap the window pane / sing the quiet song of rain.
Output (b): Rain is water that falls from clouds in the sky.
Better: Output (a)
(Only the first is a rhyme.)

### Example
Instruction: Turn the sentence into a question.
Input:
The shop opens at nine.
Output (a): The shop opens at nine, I think?
Output (b): When does the shop open?
Better: Output (b)
(The first is still a statement.)

### To choose
{item}
Output (a): {first}
Output (b): {second}
Better:"""

_RATING_AGAIN = """How good is an answer? Below you see what was asked, and what a program answered.

Mark the answer with a number from 1 to 7. An answer that could not be better gets 7, one that is of no use \
or harmful gets 1; the numbers between are even steps.
What counts:
- It is true, it fits the text it is about, and it does what was asked.
- It reads easily, in a sensible order, and says nothing twice.
- It hurts, deceives or endangers nobody.
Weigh all of it, then write the number and nothing else.

### First solved case
Instruction: Say in one sentence what a bicycle is.
Answer: A bicycle is a bicycle that one
Grade: 1
(It explains nothing and breaks off.)

### Second solved case
Instruction: In which year did the theatre open?
Input:
The theatre was planned in 1908 and opened three years later.
Answer: It opened in 1911.
Grade: 7
(Right and complete.)

### Your case
{item}
Answer: {response}
Grade:"""

_RANKING_AGAIN = """Two programs answered the same instruction. Which of them did it better?

Say "Output (a)" for the first or "Output (b)" for the second{equal}; write nothing more.
What counts:
- It is true, it fits the text it is about, and it does what was asked.
- It reads easily, in a sensible order, and says nothing twice.
- It hurts, deceives or endangers nobody.

### First solved case
Instruction: In which year did the theatre open?
Input:
The theatre was planned in 1908 and opened three years later.
Output (a): It opened in 1908.
Output (b): It opened in 1911.
Better: Output (b)
(1908 is the year of the plan.)

### Second solved case
Instruction: Say in one sentence what a bicycle is.
Output (a): A bicycle is a vehicle with two wheels that its rider drives with pedals.
Output (b): A bicycle is a bicycle that one
Better: Output (a)
(The other one explains nothing.)

### Your case
{item}
Output (a): {first}
Output (b): {second}
Better:"""

RATING = (_RATING, _RATING_AGAIN)
RANKING = (_RANKING, _RANKING_AGAIN)


def item_text(instruction: str, input: str) -> str:
    """What was asked, as every prompt shows it; an empty input is left out."""
    return f"Instruction: {instruction}" + (f"\nInput:\n{input}" if input.strip() else "")


def rating_prompt(instruction: str, input: str, response: str, *, wording: int = 0) -> str:
    """The rating protocol's user message.  IndexError for a wording that there is not."""
    item = item_text(instruction, input)
    return RATING[wording].format(dimensions=DIMENSIONS, item=item, response=response)


def ranking_prompt(
    instruction: str, input: str, first: str, second: str, *, equal: bool = False, wording: int = 0
) -> str:
    """The ranking protocol's user message; `equal` offers "Equal" as a third answer."""
    third = ', with "Equal" if neither is better' if equal else ""
    item = item_text(instruction, input)
    return RANKING[wording].format(
        dimensions=DIMENSIONS, equal=third, item=item, first=first, second=second
    )
