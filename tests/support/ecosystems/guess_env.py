"""An OpenEnv server that needs no network: two tries to say the letter that a seed stands for."""

import sys

import uvicorn
from openenv.core import Action, Environment, Observation, State, create_fastapi_app

LETTERS = "aeiou"


class Say(Action):
    letter: str


class Seen(Observation):
    text: str


class Guess(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        super().__init__()
        self._state, self.wanted = State(), "a"

    def reset(self, seed=None, episode_id=None, **_):
        self._state, self.wanted = State(), LETTERS[(seed or 0) % len(LETTERS)]
        return Seen(text=f"Say something with the letter {self.wanted}.")

    def step(self, action, timeout_s=None, **_):
        self._state.step_count += 1
        share = action.letter.count(self.wanted) / max(1, len(action.letter))
        done = share > 0.5 or self._state.step_count == 2
        return Seen(text=f"{share:.2f}", reward=share / self._state.step_count, done=done)

    @property
    def state(self):
        return self._state


app = create_fastapi_app(Guess, Say, Seen, max_concurrent_envs=64)

if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
