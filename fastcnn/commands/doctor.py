"""`fastcnn doctor`: what this machine offers, and what is missing."""

from typing import Any

from fastcnn.commands.output import as_text
from fastcnn.commands.parser import Parser, add_debug, add_json, new_parser
from fastcnn.errors import UsageError


def parser() -> Parser:
    found = new_parser("doctor", "Show versions and devices, what is missing, and the remedy.")
    add_json(found)
    add_debug(found)
    return found


def run(given: dict[str, Any], command: list[str]) -> None:
    from fastcnn import doctor

    findings = doctor.examine()
    if given.get("json"):
        print(as_text(doctor.as_json(findings)))
    else:
        doctor.print_report(findings)
    if any(finding.needed and not finding.ok for finding in findings):
        raise UsageError("fastcnn cannot train on this machine; the remedies stand above")
