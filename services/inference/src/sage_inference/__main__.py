from sage_inference.main import main

main()
