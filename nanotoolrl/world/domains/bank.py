"""Accounts and bills."""

from dataclasses import dataclass, field
from random import Random

from nanotoolrl.world.api import API, ToolError, check_known
from nanotoolrl.world.goals import Goal, register

ACCOUNTS = "savings checking travel family business school garden rent".split()
PAYEES = "water power phone gas internet insurance tax school doctor club".split()


@dataclass
class Bank(API):
    """Accounts and bills of one customer; money in whole coins."""

    pool = "train"
    accounts: dict[str, int] = field(default_factory=dict)
    bills: dict[str, int] = field(default_factory=dict)

    def _take(self, account: str, amount: int) -> None:
        check_known("account", account, self.accounts)
        if amount <= 0:
            raise ToolError(f"the amount must be positive, not {amount}")
        if self.accounts[account] < amount:
            raise ToolError(f"'{account}' holds only {self.accounts[account]}")
        self.accounts[account] -= amount

    def get_balance(self, account: str) -> dict:
        """Read the balance of an account."""
        check_known("account", account, self.accounts)
        return {"balance": self.accounts[account]}

    def transfer(self, source: str, target: str, amount: int) -> str:
        """Move money between accounts."""
        check_known("account", target, self.accounts)
        if source == target:
            raise ToolError(f"source and target are both '{source}'")
        self._take(source, amount)
        self.accounts[target] += amount
        return "transferred"

    def find_bill(self, payee: str) -> dict:
        """Find what is owed to a payee."""
        check_known("bill from", payee, self.bills)
        return {"amount": self.bills[payee]}

    def pay_bill(self, account: str, payee: str, amount: int) -> str:
        """Pay a bill in full from an account."""
        check_known("bill from", payee, self.bills)
        if amount != self.bills[payee]:
            raise ToolError(f"the bill from '{payee}' is not {amount}; look it up with find_bill")
        self._take(account, amount)
        del self.bills[payee]
        return "paid"


def world(rng: Random, size: int) -> dict:
    accounts = {account: rng.randint(300, 999) for account in rng.sample(ACCOUNTS, min(size, 6))}
    return {
        "accounts": accounts,
        "bills": {p: rng.randint(11, 199) for p in rng.sample(PAYEES, min(size, 8))},
    }


def draw(rng: Random, api: Bank) -> dict:
    account = rng.choice([a for a, money in api.accounts.items() if money >= 200])
    target = rng.choice([a for a in api.accounts if a != account])
    return {
        "account": account,
        "to": target,
        "coins": rng.randint(11, 99),
        "payee": rng.choice(list(api.bills)),
    }


GOALS = [
    Goal("How much is in {account}?|What is the balance of {account}?", "get_balance account", "{balance}."),
    Goal(
        "Move {coins} from {account} to {to}.|Transfer {coins} out of {account} into {to}.",
        "transfer source=account target=to amount=coins",
        "Moved.",
        vague="Move money from {account} to {to}.|Transfer something out of {account} into {to}.",
        question="How much?",
        answer="{coins}.|Move {coins}.",
    ),
    Goal(
        "Pay the {payee} bill from {account}.|Use {account} to pay what I owe for {payee}.",
        "find_bill payee; pay_bill account payee amount",
        "Paid {amount}.",
        vague="Pay the {payee} bill.|Settle what I owe for {payee}.",
        question="From which account?",
        answer="From {account}.|Use {account}.",
    ),
    Goal(
        "Move everything in {account} to {to}.|Empty {account} into {to}.",
        "get_balance account; transfer source=account target=to amount=balance",
        "Moved {balance}.",
    ),
    Goal("What do I owe for {payee}?|How high is the {payee} bill?", "find_bill payee", "{amount}."),
]

register(Bank, world, draw, GOALS)
