"""Names and roles that stand in for the speaker labels "User" and "Assistant" of a dialogue.

Varied on purpose: a refusal must not hang on the label "Assistant" (Maini et al. 2025, appendix C.3).
"""

SPEAKER_NAMES = (
    "Aisha", "Alejandro", "Amara", "Andrei", "Anika", "Arjun", "Beatriz", "Bilal", "Carmen", "Chidi", "Clara", "Daiki",
    "Dalia", "Darius", "Elena", "Emeka", "Esther", "Farid", "Fatima", "Felix", "Freya", "Gabriel", "Greta", "Hana",
    "Hassan", "Hugo", "Ines", "Ivan", "Jasmine", "Jonas", "Kenji", "Kwame", "Laila", "Leah", "Linh", "Lucas", "Magda",
    "Mateo", "Mei", "Mira", "Nadia", "Nikhil", "Noor", "Olga", "Omar", "Paloma", "Pavel", "Priya", "Quentin", "Rafael",
    "Rosa", "Ruth", "Samir", "Sofia", "Soren", "Tariq", "Teresa", "Thabo", "Uma", "Valentina", "Viktor", "Wei",
    "Ximena", "Yara", "Yusuf", "Zofia",
)  # fmt: skip

# (who asks, who answers)
ROLE_PAIRS = (
    ("Student", "Teacher"), ("Pupil", "Tutor"), ("Patient", "Nurse"), ("Client", "Counselor"), ("Visitor", "Guide"),
    ("Reader", "Librarian"), ("Customer", "Clerk"), ("Caller", "Host"), ("Trainee", "Mentor"), ("Guest", "Concierge"),
    ("Nephew", "Aunt"), ("Neighbor", "Gardener"), ("Player", "Coach"), ("Apprentice", "Craftsman"),
    ("Reporter", "Expert"), ("Citizen", "Officer"), ("Child", "Parent"), ("Tenant", "Advisor"),
)  # fmt: skip
