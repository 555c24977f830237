"""German words by which ``data.domains`` knows what a text is about; ``*`` stands for any beginning or ending."""

WORDS = {
    "geography": """
        stadt städte stadtteil dorf dörfer gemeinde gemeinden hauptstadt fluss flüsse see insel inseln halbinsel
        gebirge berg berge tal wüste küste küsten* provinz region regionen landkreis bezirk grenze grenzen
        grenzt einwohner* bevölkerung klima kontinent* ozean meer golf bucht archipel vulkan* ebene norden süden
        osten westen nördlich* südlich* östlich* westlich* kilometer geograph* geograf* gletscher regenwald
        nebenfluss staatsgebiet liegt gelegen land länder atlas landschaft ortschaft hafenstadt breitengrad*
        längengrad*""",
    "history": """
        krieg* schlacht kaiser* könig* dynastie antike mittelalter* revolution vertrag jahrhundert* reich
        herrschaft herrscher erobert* eroberung kolonie* kolonial* invasion kreuzzug* soldat* armee aufstand
        belagerung thron pharao* zivilisation archäolog* vorgeschicht* bronzezeit* histor* geschichte
        geschichtlich* nazi* sowjet* napoleon* osmanisch* römisch* mongol* wikinger* unabhängigkeit* sklaverei
        bündnis* holocaust waffenstillstand feudal* monarch* herzog* feldherr truppen heer weltkrieg* *krieg
        *krieges reformation ddr weimarer""",
    "science": """
        physik* chemie* chemisch* biolog* atom* molekül* elektron* proton* neutron* energie* teilchen quanten*
        art arten gattung säugetier* vogel vögel fisch fische insekt* pflanze* tier tiere zelle zellen zell*
        protein* gen gene genetisch* dna dns evolution* ökosystem* organism* planet* stern sterne galaxi*
        teleskop astronom* sonnen* umlaufbahn schwerkraft gravitation* geschwindigkeit wellenlänge isotop*
        säure* sauerstoff wasserstoff kohlenstoff mineral* gestein* fossil* dinosaurier* fotosynthese
        photosynthese lebensraum temperatur* strahlung* elektromagnet* magnet* element* verbindung metall*
        reaktion labor* experiment* wissenschaft* geolog* bakterien ökolog* larven masse kraft welle wellen""",
    "mathematics": """
        mathemat* satz gleichung* algebra* geometr* ganzzahl* polynom* matrix matrizen vektor* integral*
        ableitung* topolog* wahrscheinlichkeit* statist* beweis* primzahl* endlich* unendlich* axiom* arithmetik
        dreieck* winkel funktion graph bruch logarithm* differential* differenzial* menge teilmenge gruppe
        abelsch* homomorph* varianz mittelwert regression summe produkt multipli* dividier* quadrat* hypotenuse
        zahl zahlen reell* rational* addieren subtrah*""",
    "medicine": """
        medizin* krankheit* erkrank* patient* behandlung* symptom* klinisch* krankenhaus* chirurg* operation
        diagnos* therap* medikament* arznei* dosis infektion* virus viren impf* krebs* tumor* blut* herz* lunge*
        niere* leber* gehirn arterie* muskel* knochen* syndrom störung* chronisch* akut* entzündung* schmerz*
        fieber immun* antibioti* arzt ärzt* pflege* gesundheit* schwanger* geburt* pharma* hormon* diabetes
        insulin anatom* nerv nerven haut atem* atmung psychiatr* sterblichkeit epidem* pandemie verletzung*
        wunde* ernährung vitamin*""",
    "technology": """
        computer* software* hardware* internet* netzwerk* server* programm* algorithm* daten datei* datenbank*
        digital* elektron* motor* maschine* flugzeug* fahrzeug* schiff schiffe eisenbahn* auto autos gerät*
        schaltkreis* spannung batterie* prozessor* speicher* betriebssystem* befehl* paket* bibliothek* modul*
        benutzer* oberfläche* schnittstelle* linux unix debian kernel* compiler anwendung* protokoll*
        verschlüssel* webseite* browser* email* roboter* satellit* rakete* ingenieur* bau brücke stahl telefon*
        radio* kamera* drucker* erweiterung* dienst* konfigur* install* option* gnome kde menü* klicken
        schaltfläche* symbolleiste tastatur* fenster verzeichnis* parameter* rückgabewert dateideskriptor
        systemaufruf* bildschirm* arbeitsfläche tabelle* zellbereich""",
    "arts": """
        kunst künstler* maler* malerei gemälde skulptur* museum museen musik* komponist* oper opern sinfonie*
        orchester* lied lieder album alben band sänger* gitarre* klavier* jazz roman romane romanautor*
        schriftsteller* dichter* dichtung gedicht* autor autorin literatur* film filme filmregisseur regisseur*
        schauspiel* theater* drama dramen tanz ballett architekt* fotograf* komödie fernsehserie serie figur
        figuren preis oscar veröffentlicht* renaissance barock* romantik impressionis* stil rockmusik konzert*
        noten notenzeile takt akkord* stimme melodie""",
    "society": """
        regierung* politi* partei* wahl wahlen gewählt präsident* parlament* minister* recht rechte gesetz*
        gericht* richter* verfassung* demokrat* wirtschaft* ökonom* markt märkte handel steuer* bank banken geld
        währung* inflation unternehmen firma firmen industrie* arbeit arbeiter gewerkschaft* sozial*
        gesellschaft* soziolog* bildung schule* universität* student* polizei verbrechen kriminal* republik
        staat staaten staatlich* bundes* bürger* einwanderung geschlecht frauen organisation* international*
        vereinte nationen kapitalis* sozialis* kommunis* konzern finanz* investition* verbraucher* vertrag
        haftung kanzler*""",
    "thought": """
        philosoph* religion* religiös* gott götter göttin kirche* christ* jesus bibel katholi* evangeli* papst
        islam* muslim* koran prophet* hindu* buddh* jüdisch* judentum theolog* heilig* seele geist ethik
        ethisch* moral* metaphys* erkenntnis* logik glaube* mythos mythen mytholog* gottheit* tempel mönch*
        gebet* ritual* lehre schrift kant platon aristoteles existenz* argument* prämisse* fehlschluss
        psycholog* bewusstsein kognitiv* weisheit dummheit sprichwort* tugend wahrheit""",
    "everyday": """
        essen speise* gericht gerichte küche kochen koch* rezept* brot fleisch käse obst frucht früchte gemüse
        reis zucker salz getränk* bier wein kaffee tee milch soße suppe* kleidung kleid hemd schuhe mode haar
        haare haus wohnung möbel zimmer bett spielzeug spiel spiele sport* fußball* basketball tennis handball
        mannschaft* spieler* liga meisterschaft* olympi* turnier* ferien fest hochzeit familie* kind kinder
        freund freunde ehe hund hunde katze katzen einkauf* haushalt* frühstück""",
}
