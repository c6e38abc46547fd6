"""Mutation testing: small faults are planted in the engines, one at a time, and the tests must see each.

    python -m property_tests.mutation --sample 200

`targets` says where faults are planted and which tests may see them, `operators` which faults there are.
`reach` notes which tests run which `statements`, `trial` plants a fault and runs these. `accepted.txt` lists
faults that are none. Nothing here imports the package itself: only the processes of trials do.
"""
