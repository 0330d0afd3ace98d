// SPDX-License-Identifier: Apache-2.0

// Package test holds tests of the repository itself. layers_test.go checks who
// imports whom, as docs and package comments promise it, by parsing every Go
// file in this process: nothing is cached, and files that do not build yet are
// checked as well.
package test

import (
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/fstest"
)

const module = "github.com/bulkheadhq/bulkhead"

// maxLines of a file written by hand.
const maxLines = 800

// layers says which packages of ours a package may import. The longest pattern
// that matches the importer decides. "x/..." is x and all below it; "x/*" is
// all below x without x.
var layers = map[string][]string{
	"proto/...": {"proto/..."},
	"tenant":    {"netpol"},

	// Mechanisms: nothing of ours, and not each other. A package below one
	// touches the machine and may use the pure one above it.
	"bpf":                 {},
	"cgroups":             {},
	"gpu":                 {},
	"gpu/*":               {"gpu"},
	"netpol":              {},
	"netpol/dns":          {"netpol"},
	"netpol/enforce":      {"netpol", "bpf"},
	"netpol/link":         {},
	"netpol/openshell":    {"netpol"},
	"netpol/policytest":   {"netpol"},
	"netpol/suggest":      {"netpol"},
	"runtime":             {},
	"runtime/logs":        {},
	"runtime/containerd":  {"runtime", "runtime/logs"},
	"runtime/runtimetest": {"runtime", "runtime/logs"},

	// The domain and its decisions: no mechanism but the pure ones.
	"agent/meter":   {"proto/usage/v1"},
	"agent/spool":   {"proto/usage/v1"},
	"agent/sandbox": {"agent/meter", "tenant", "netpol", "runtime", "gpu"},
	"agent/admit":   {"agent/sandbox", "tenant", "netpol", "gpu"},
	"agent/place":   {"agent/sandbox", "tenant", "netpol", "gpu"},
	"agent/config":  {"tenant", "netpol"},
	"agent/store":   {"agent/sandbox", "agent/meter", "agent/place", "agent/budget", "tenant"},
	"agent/report":  {"agent/spool", "proto/..."},
	"agent/*":       {"agent/*", "tenant", "netpol", "netpol/suggest", "runtime", "runtime/logs", "gpu", "proto/..."},
	// Only the wiring sees implementations.
	"agent": {"agent/*", "tenant", "cgroups", "gpu/...", "netpol/...", "runtime/...", "bpf", "proto/..."},

	"gateway/...": {"gateway/*", "tenant", "proto/..."},

	"cmd/bulkhead/...":     {"cmd/bulkhead/*", "tenant", "netpol", "netpol/openshell", "netpol/policytest", "proto/..."},
	"cmd/bulkhead-agent":   {"agent", "agent/config"},
	"cmd/bulkhead-gateway": {"gateway", "gateway/config"},
	"cmd/bulkhead-log":     {"runtime/logs"},
	"cmd/bulkhead-init":    {},

	"test/...": {"..."},
}

// fences say where alone a module of others may be imported.
var fences = []struct {
	prefix  string
	allowed []string
}{
	{"github.com/NVIDIA/go-nvml", []string{"gpu/nvml"}},
	{"github.com/containerd/", []string{"runtime/containerd"}},
	{"go.etcd.io/bbolt", []string{"agent/store"}},
	{"github.com/cilium/ebpf", []string{"bpf", "netpol/enforce"}},
	{"database/sql", []string{"gateway/*"}},
	{"modernc.org/", []string{"gateway/*"}},
	{"github.com/google/nftables", []string{"netpol/link"}},
	{"github.com/vishvananda/", []string{"netpol/enforce", "netpol/link"}},
	{"github.com/google/go-containerregistry", nil},
	{"github.com/spf13/", []string{"cmd/..."}},
	{"testing", nil}, // and testing/...: of tests only
}

// pure packages decide and never touch the machine.
var pure = []string{"agent/admit", "agent/meter", "agent/place", "agent/sandbox", "gpu", "netpol", "netpol/openshell", "netpol/policytest", "netpol/suggest", "runtime"}

// impure are imports that a pure package has no use for.
var impure = []string{"os", "os/", "net/http", "golang.org/x/sys/", "database/sql", "github.com/"}

// pureParsers are the exceptions to "github.com/": text in, values out.
var pureParsers = []string{"github.com/agext/levenshtein", "github.com/docker/go-units"}

// small are commands whose whole work is elsewhere, with their longest length.
var small = map[string]int{"cmd/bulkhead-agent": 80, "cmd/bulkhead-gateway": 80}

// matches says whether a package, by its path below the module, is meant by a
// pattern.
func matches(pattern, pkg string) bool {
	if pattern == "..." {
		return true
	}
	if base, ok := strings.CutSuffix(pattern, "/..."); ok {
		return pkg == base || strings.HasPrefix(pkg, base+"/")
	}
	if base, ok := strings.CutSuffix(pattern, "/*"); ok {
		return strings.HasPrefix(pkg, base+"/")
	}
	return pkg == pattern
}

func matchesAny(patterns []string, pkg string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return matches(p, pkg) })
}

// layerOf answers the entry of layers that decides for a package.
func layerOf(pkg string) (allowed []string, ok bool) {
	best := ""
	for pattern := range layers {
		if matches(pattern, pkg) && len(pattern) > len(best) {
			best = pattern
		}
	}
	return layers[best], best != ""
}

// testSupport says whether a package exists for tests: test/..., xtest. What
// netpol/policytest tests is not code.
func testSupport(pkg string) bool {
	return matches("test/...", pkg) || strings.HasSuffix(pkg, "test") && pkg != "netpol/policytest"
}

// source is one Go file.
type source struct {
	file    string // below the root
	pkg     string // its directory; "." is the root
	test    bool
	written bool // by hand, that is, not generated
	doc     bool // carries a package comment
	imports []string
	lines   int
	first   string // its first line
}

// readSources parses every Go file of the module, leaving out nested modules,
// testdata, build and hidden directories.
func readSources(root fs.FS) ([]source, error) {
	var all []source
	err := fs.WalkDir(root, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if name == "." {
				return nil
			}
			_, nested := fs.Stat(root, path.Join(name, "go.mod"))
			if nested == nil || name == "build" || d.Name() == "testdata" || strings.HasPrefix(d.Name(), ".") {
				return fs.SkipDir
			}
			return nil
		}
		if path.Ext(name) != ".go" {
			return nil
		}
		body, err := fs.ReadFile(root, name)
		if errors.Is(err, fs.ErrNotExist) {
			return nil // an editor's file that has gone meanwhile
		}
		if err != nil {
			return err
		}
		f, err := parser.ParseFile(token.NewFileSet(), name, body, parser.ImportsOnly|parser.ParseComments)
		if err != nil {
			return err
		}
		s := source{
			file: name, pkg: path.Dir(name), test: strings.HasSuffix(name, "_test.go"),
			written: !ast.IsGenerated(f), lines: strings.Count(string(body), "\n"),
		}
		// A licence or a directive that sticks to the clause is no package comment.
		text := f.Doc.Text()
		s.doc = strings.HasPrefix(text, "Package ") || strings.HasPrefix(text, "Command ")
		s.first, _, _ = strings.Cut(string(body), "\n")
		for _, i := range f.Imports {
			imported, err := strconv.Unquote(i.Path.Value)
			if err != nil {
				return fmt.Errorf("%s: import %s: %w", name, i.Path.Value, err)
			}
			s.imports = append(s.imports, imported)
		}
		all = append(all, s)
		return nil
	})
	return all, err
}

// check answers what breaks a rule, one line each, sorted.
func check(sources []source) []string {
	var found []string
	say := func(format string, args ...any) { found = append(found, fmt.Sprintf(format, args...)) }
	documented, length := map[string]bool{}, map[string]int{}
	sides := map[string]map[string]bool{} // package -> agent or gateway, tests included
	for _, s := range sources {
		if s.written && !s.test {
			documented[s.pkg] = documented[s.pkg] || s.doc
			length[s.pkg] += s.lines
		}
		if s.written && s.first != "// SPDX-License-Identifier: Apache-2.0" {
			say("%s: the first line is not the SPDX header", s.file)
		}
		if s.written && s.lines > maxLines {
			say("%s: %d lines, want at most %d", s.file, s.lines, maxLines)
		}
		if sides[s.pkg] == nil {
			sides[s.pkg] = map[string]bool{}
		}
		for _, imported := range append(s.imports, module+"/"+s.pkg) {
			ours, _ := strings.CutPrefix(imported, module+"/")
			for _, side := range []string{"agent", "gateway"} {
				if ours != imported && (matches(side+"/...", ours) || ours == "cmd/bulkhead-"+side) {
					sides[s.pkg][side] = true
				}
			}
		}
		for _, imported := range s.imports {
			if why := refuse(s, imported); why != "" {
				say("%s: imports %s: %s", s.file, strings.TrimPrefix(imported, module+"/"), why)
			}
		}
	}
	for pkg, ok := range documented {
		if !ok {
			say("%s: no file has a package comment", pkg)
		}
	}
	for pkg, side := range sides {
		if side["agent"] && side["gateway"] {
			say("%s: sees agent and gateway; they meet in proto and tenant, and are tested together only as processes", pkg)
		}
	}
	for pkg, limit := range small {
		if length[pkg] > limit {
			say("%s: %d lines, want at most %d: its work belongs into the package that it calls", pkg, length[pkg], limit)
		}
	}
	slices.Sort(found)
	return slices.Compact(found)
}

// refuse says why a file may not import a package; "" if it may.
func refuse(s source, imported string) string {
	if s.test {
		return "" // the agent and gateway rule is for the whole package
	}
	if ours, ok := strings.CutPrefix(imported, module+"/"); ok {
		allowed, known := layerOf(s.pkg)
		switch {
		case !known:
			return "the package is in no layer; test/layers_test.go lists them"
		case ours == "test/need" && testSupport(s.pkg):
			return ""
		case strings.HasSuffix(s.pkg, "test") && ours == path.Dir(s.pkg):
			return "" // a fake of its parent
		case strings.HasSuffix(s.pkg, "test") && strings.HasPrefix(s.pkg, "agent/") && !matches("gateway/...", ours):
			return "" // a fake is made of working parts
		case testSupport(ours) && !testSupport(s.pkg):
			return "it is for tests"
		case !matchesAny(allowed, ours):
			return "its layer may import only [" + strings.Join(allowed, " ") + "]"
		}
		return ""
	}
	if testSupport(s.pkg) {
		return ""
	}
	for _, f := range fences {
		if strings.HasPrefix(imported+"/", strings.TrimSuffix(f.prefix, "/")+"/") && !matchesAny(f.allowed, s.pkg) {
			return fmt.Sprintf("only %v may", f.allowed)
		}
	}
	if slices.Contains(pure, s.pkg) && !slices.Contains(pureParsers, imported) {
		for _, prefix := range impure {
			if imported == prefix || strings.HasSuffix(prefix, "/") && strings.HasPrefix(imported, prefix) {
				return "the package is pure"
			}
		}
	}
	return ""
}

func TestLayers(t *testing.T) {
	sources, err := readSources(os.DirFS(".."))
	if err != nil {
		t.Fatal(err)
	}
	if len(sources) == 0 {
		t.Fatal("no Go files found")
	}
	for _, problem := range check(sources) {
		t.Error(problem)
	}
}

// TestHeaders checks the files that are not Go.
func TestHeaders(t *testing.T) {
	want := map[string]string{
		".sh": "SPDX-License-Identifier: Apache-2.0", ".proto": "SPDX-License-Identifier: Apache-2.0",
		".c": "SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause", ".h": "SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause",
	}
	root := os.DirFS("..")
	err := fs.WalkDir(root, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			if d != nil && (name == "build" || strings.HasPrefix(d.Name(), ".") && name != ".") {
				return fs.SkipDir
			}
			return err
		}
		header, ok := want[path.Ext(name)]
		if !ok {
			return nil
		}
		body, err := fs.ReadFile(root, name)
		if err != nil {
			return err
		}
		head := strings.Join(strings.SplitN(string(body), "\n", 4)[:min(3, strings.Count(string(body), "\n"))], "\n")
		if plain := strings.NewReplacer("(", "", ")", "").Replace(head); !strings.Contains(plain, header) {
			t.Errorf("%s: its first lines lack %q", name, header)
		}
		if lines := strings.Count(string(body), "\n"); lines > maxLines {
			t.Errorf("%s: %d lines, want at most %d", name, lines, maxLines)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestRulesBite shows that each rule finds a file that breaks it, and that the
// same import is fine where it belongs.
func TestRulesBite(t *testing.T) {
	ours := func(pkg string) string { return module + "/" + pkg }
	for name, tt := range map[string]struct {
		file     string
		imported string
		want     string // "" = allowed
	}{
		"mechanism imports mechanism": {"cgroups/x.go", ours("netpol"), "its layer may import only []"},
		"mechanism imports agent":     {"netpol/link/x.go", ours("agent/sandbox"), "its layer may import only []"},
		"enforce imports bpf":         {"netpol/enforce/x.go", ours("bpf"), ""},
		"link imports bpf":            {"netpol/link/x.go", ours("bpf"), "its layer may import only"},
		"domain imports machine":      {"agent/sandbox/x.go", ours("runtime/containerd"), "its layer may import only"},
		"supervisor imports machine":  {"agent/supervisor/x.go", ours("netpol/enforce"), "its layer may import only"},
		"wiring imports machine":      {"agent/x.go", ours("netpol/enforce"), ""},
		"gateway imports agent":       {"gateway/ingest/x.go", ours("agent/meter"), "they meet in proto and tenant"},
		"gateway test imports agent":  {"gateway/ingest/x_test.go", ours("agent/meter"), "they meet in proto and tenant"},
		"agent test imports gateway":  {"agent/report/x_test.go", ours("gateway"), "they meet in proto and tenant"},
		"gateway imports netpol":      {"gateway/x.go", ours("netpol"), "its layer may import only"},
		"cli imports agent":           {"cmd/bulkhead/x.go", ours("agent/api"), "its layer may import only"},
		"agent command imports store": {"cmd/bulkhead-agent/x.go", ours("agent/store"), "its layer may import only"},
		"product imports test":        {"agent/x.go", ours("test/rig"), "it is for tests"},
		"product imports fake":        {"agent/x.go", ours("runtime/runtimetest"), "it is for tests"},
		"unknown package":             {"util/x.go", ours("tenant"), "is in no layer"},
		"nvml outside":                {"gpu/x.go", "github.com/NVIDIA/go-nvml/pkg/nvml", "only [gpu/nvml] may"},
		"nvml inside":                 {"gpu/nvml/x.go", "github.com/NVIDIA/go-nvml/pkg/nvml", ""},
		"containerd outside":          {"agent/x.go", "github.com/containerd/containerd/v2/client", "only [runtime/containerd] may"},
		"containerd in a test":        {"agent/x_test.go", "github.com/containerd/containerd/v2/client", ""},
		"bbolt outside":               {"agent/spool/x.go", "go.etcd.io/bbolt", "only [agent/store] may"},
		"ebpf outside":                {"netpol/link/x.go", "github.com/cilium/ebpf/link", "only [bpf netpol/enforce] may"},
		"sql outside":                 {"agent/x.go", "database/sql", "only [gateway/*] may"},
		"sql inside":                  {"gateway/ledger/x.go", "database/sql", ""},
		"sqlite in the gateway root":  {"gateway/x.go", "modernc.org/sqlite", "only [gateway/*] may"},
		"testing in the product":      {"agent/x.go", "testing", "only [] may"},
		"pure package reads files":    {"netpol/x.go", "os", "the package is pure"},
		"pure package calls kernel":   {"agent/place/x.go", "golang.org/x/sys/unix", "the package is pure"},
		"pure package and addresses":  {"netpol/x.go", "net/netip", ""},
	} {
		t.Run(name, func(t *testing.T) {
			body := "// SPDX-License-Identifier: Apache-2.0\n\n// Package x.\npackage x\n\nimport _ \"" + tt.imported + "\"\n"
			got := checkTree(t, map[string]string{tt.file: body})
			if tt.want == "" && got != "" || tt.want != "" && !strings.Contains(got, tt.want) {
				t.Errorf("got %q, want %q in it", got, tt.want)
			}
		})
	}
	header := "// SPDX-License-Identifier: Apache-2.0\n\n"
	for name, tt := range map[string]struct {
		files map[string]string
		want  string
	}{
		"a rig that links both sides": {map[string]string{
			"test/rig/a.go": header + "// Package rig.\npackage rig\n\nimport _ \"" + ours("agent") + "\"\n",
			"test/rig/b.go": header + "package rig\n\nimport _ \"" + ours("gateway/ledger") + "\"\n",
		}, "test/rig: sees agent and gateway"},
		"no package comment": {map[string]string{"tenant/x.go": header + "package tenant\n"}, "tenant: no file has a package comment"},
		"a header is not a package comment": {
			map[string]string{"tenant/x.go": strings.TrimSpace(header) + "\npackage tenant\n"}, "no file has a package comment",
		},
		"no header": {map[string]string{"tenant/x.go": "// Package tenant.\npackage tenant\n"}, "not the SPDX header"},
		"generated": {map[string]string{"proto/x.go": "// Code generated by x. DO NOT EDIT.\n\npackage proto\n" + strings.Repeat("\n", 900)}, ""},
		"long": {
			map[string]string{"tenant/x.go": header + "// Package tenant.\npackage tenant\n" + strings.Repeat("\n", 900)}, "904 lines, want at most 800",
		},
		"a command that does the work": {
			map[string]string{"cmd/bulkhead-agent/x.go": header + "// Command x.\npackage main\n" + strings.Repeat("\n", 90)}, "94 lines, want at most 80",
		},
		"nested module": {map[string]string{"test/tools/go.mod": "module x\n", "test/tools/x.go": "package x\n"}, ""},
		"testdata":      {map[string]string{"netpol/testdata/x.go": "package x\n"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			got := checkTree(t, tt.files)
			if tt.want == "" && got != "" || tt.want != "" && !strings.Contains(got, tt.want) {
				t.Errorf("got %q, want %q in it", got, tt.want)
			}
		})
	}
}

func checkTree(t *testing.T, files map[string]string) string {
	t.Helper()
	tree := fstest.MapFS{}
	for name, body := range files {
		tree[name] = &fstest.MapFile{Data: []byte(body)}
	}
	sources, err := readSources(tree)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(check(sources), "\n")
}
