"""What one does on the playground's page, and what one sees there."""

QUESTION = "Where is the lighthouse?"


def ask(page, expect, question=QUESTION, panes=2):
    """Send a question and wait for all answers."""
    expect(page.locator(".pane")).to_have_count(panes)
    num_before = page.locator(".question").count()
    page.get_by_label("Prompt for all panes").fill(question)
    page.keyboard.press("Enter")
    expect(page.locator(".question")).to_have_count(num_before + panes)
    expect(page.locator("#send")).to_be_visible()
    states = page.locator(".turn:last-child .answer")
    expect(states).to_have_count(panes)
    for i in range(panes):
        expect(states.nth(i)).to_have_attribute("data-state", "done")


def pane(page, number):
    return page.locator(".pane").nth(number - 1)


def answer_of(page, number):
    return pane(page, number).locator(".answer .text").last.text_content()


def slide(page, number, state, *values):
    """Move a slider through values, faster than anybody could."""
    slider = pane(page, number).get_by_label(f"Weight of {state}")
    slider.evaluate(
        "(e, vs) => vs.forEach((v) => { e.value = v; e.dispatchEvent(new Event('input')); })",
        [str(value) for value in values],
    )
