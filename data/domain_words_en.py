"""English words by which ``data.domains`` knows what a text is about; ``*`` stands for any ending."""

WORDS = {
    "geography": """
        city cities town village capital river rivers lake island islands peninsula mountain mountains valley
        desert coast coastal province region regions municipality county district border bordered borders
        located population inhabitants climate continent ocean sea gulf strait bay archipelago volcano plateau
        basin longitude latitude country countries northern southern eastern western southeast northwest
        northeast southwest kilometres kilometers metropolitan harbour harbor glacier rainforest census
        geograph* territory territories km2 tributary area landlocked""",
    "history": """
        war wars battle empire emperor king queen dynasty ancient medieval revolution treaty century centuries
        reign kingdom conquest conquered colonial colony invasion crusade crusades soldier soldiers army
        rebellion siege throne pharaoh civilization archaeolog* prehistoric bronze historian historians
        historical bc bce ruler ruled sultan caliphate khan nazi soviet napoleon* ottoman roman byzantine mongol
        viking vikings independence abolished slavery alliance holocaust armistice feudal monarch monarchy duke
        general military commander fought defeated surrender""",
    "science": """
        physics chemical chemistry biology atom atoms molecule molecules electron electrons proton neutron
        energy particle particles quantum species genus mammal mammals bird birds fish insect insects plant
        plants animal animals cell cells protein proteins gene genes dna evolution ecosystem organism organisms
        planet planets star stars galaxy galaxies telescope astronom* solar orbit orbits gravity velocity
        wavelength isotope acid oxygen hydrogen carbon mineral minerals rock rocks fossil fossils dinosaur*
        photosynthesis predator habitat thermodynamic* temperature radiation electromagnetic magnetic element
        elements compound compounds metal reaction laboratory experiment scientific scientist geolog* bacteria
        ecolog* larvae flowering genera taxonom* mass force wave waves experimental""",
    "mathematics": """
        mathematic* theorem theorems equation equations algebra algebraic geometry geometric integer integers
        polynomial matrix vector vectors calculus integral derivative topology probability statistic* proof
        prime finite infinite axiom axioms arithmetic triangle polygon angle angles function functions graph
        fraction logarithm* euclid* differential set sets subset group abelian homomorphism variance mean
        regression sum product multiply divided square cube hypotenuse number numbers real rational""",
    "medicine": """
        medicine medical disease diseases patient patients treatment treatments symptom symptoms clinical
        hospital surgery surgical diagnos* therapy therapies drug drugs dose infection infections virus viruses
        vaccine vaccin* cancer tumor tumour blood heart lung lungs kidney liver brain artery arteries muscle
        muscles bone bones syndrome disorder disorders chronic acute inflammation pain fever immune antibiotic*
        physician doctor nurse nursing health healthcare pregnan* birth pharmac* hormone hormones diabetes
        insulin anatom* nerve nerves skin respiratory cardiac mental psychiatr* mortality epidemic pandemic
        injury wound nutrition vitamin""",
    "technology": """
        computer computers software hardware internet network networks server servers program programming
        algorithm algorithms data database digital electronic electronics engine engines machine machines
        aircraft vehicle vehicles ship ships railway automobile car cars device devices circuit circuits voltage
        battery processor memory operating system file files command commands package packages library libraries
        module user users interface linux unix debian kernel compiler application applications protocol
        bandwidth encryption website web browser email robot* satellite rocket engineering engineer construction
        bridge steel manufacturing telephone radio television camera printer plugin daemon configuration install
        installed gnome kde desktop toolkit bindings api""",
    "arts": """
        art arts artist artists painter painting paintings sculpture museum music musical musician composer
        composed opera symphony orchestra song songs album albums band singer guitar piano jazz novel novels
        novelist poet poetry poem poems writer author literature literary fiction film films movie director
        actor actress theatre theater drama playwright dance ballet architecture architect photograph* comedy
        television series character characters award oscar grammy published renaissance baroque romantic
        impressionis* style rock hip rapper concert studio released""",
    "society": """
        government political politic* party parties election elections elected president parliament minister law
        laws legal court courts judge rights constitution democracy democratic economic economy economics market
        markets trade tax taxes bank banks money currency inflation company companies business industry labour
        labor union social society sociolog* education school schools university students police crime criminal
        policy policies republic state states federal citizens immigration gender women organization
        organisation international nations treaty capitalism socialism communism corporation finance financial
        investment consumer contract liability prime senator congress""",
    "thought": """
        philosophy philosopher philosoph* religion religious god gods goddess church christian christianity
        jesus christ bible catholic pope islam muslim quran prophet hindu hinduism buddha buddhis* jewish
        judaism theology theolog* saint soul spirit ethics ethical moral morality metaphysic* epistemolog* logic
        belief beliefs myth mythology deity worship temple monk monks prayer ritual rituals doctrine faith
        scripture holy sacred kant plato aristotle existential* argument premise premises fallacy psycholog*
        consciousness cognitive""",
    "everyday": """
        food foods dish dishes cuisine cook cooking cooked recipe bread meat cheese fruit fruits vegetable
        vegetables rice sugar salt drink drinks beer wine coffee tea milk sauce soup clothing clothes dress
        shirt shoes garment fashion hair house home furniture kitchen room bed toy toys game games sport sports
        football soccer basketball cricket tennis baseball hockey team teams player players league championship
        olympic* tournament match holiday festival wedding family child children friend friends marriage pet dog
        dogs cat cats shop shopping tool household eaten""",
}
