// SPDX-License-Identifier: Apache-2.0

package report

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/credentials"
)

func TestTargetIsChecked(t *testing.T) {
	dir := t.TempDir()
	empty := filepath.Join(dir, "empty.pem")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		cfg  Config
		want string
	}{
		"empty":            {Config{}, "no scheme"},
		"no scheme":        {Config{Target: "gateway:7443"}, "no scheme"},
		"other scheme":     {Config{Target: "https://gateway"}, "unknown scheme"},
		"no port":          {Config{Target: "tcp://gateway"}, "no host and port"},
		"no host":          {Config{Target: "tcp://:7443"}, "no host and port"},
		"relative path":    {Config{Target: "unix://s"}, "not absolute"},
		"socket with cert": {Config{Target: "unix:///s", CAFile: empty}, "certificates are for tcp"},
		"half a pair":      {Config{Target: "tcp://g:1", CertFile: empty}, "go together"},
		"no such CA":       {Config{Target: "tcp://g:1", CAFile: filepath.Join(dir, "none")}, "read gateway CA"},
		"empty CA":         {Config{Target: "tcp://g:1", CAFile: empty}, "no certificate in"},
		"bad pair":         {Config{Target: "tcp://g:1", CertFile: empty, KeyFile: empty}, "read node certificate"},
	} {
		tc.cfg.NodeID = node
		if _, err := New(tc.cfg, nil); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: got %v, want %q", name, err, tc.want)
		}
	}
	if _, err := New(Config{Target: "unix:///s"}, nil); err == nil {
		t.Error("no node id: accepted")
	}
	for _, ok := range []Config{{Target: "unix:///run/s"}, {Target: "tcp://gateway.example.com:7443"}, {Target: "tcp://[::1]:7443"}} {
		ok.NodeID = node
		r, err := New(ok, nil)
		if err != nil {
			t.Fatal(err)
		}
		if got := r.Status().State; got != Connecting {
			t.Errorf("state is %s", got)
		}
	}
}

// authority is a CA that lives for one test.
type authority struct {
	t    testing.TB
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	file string
}

func newAuthority(t testing.TB, name string) *authority {
	t.Helper()
	a := &authority{t: t, dir: t.TempDir()}
	a.key, _ = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &a.key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	a.cert, _ = x509.ParseCertificate(der)
	a.file = a.write(name+".pem", "CERTIFICATE", der)
	return a
}

func (a *authority) write(name, kind string, der []byte) string {
	a.t.Helper()
	path := filepath.Join(a.dir, name)
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		a.t.Fatal(err)
	}
	return path
}

// issue makes a certificate for an address or a name.
func (a *authority) issue(name string) (cert, key string) {
	a.t.Helper()
	k, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if ip := net.ParseIP(name); ip != nil {
		tmpl.IPAddresses = []net.IP{ip}
	} else {
		tmpl.DNSNames = []string{name}
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, &k.PublicKey, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	kder, _ := x509.MarshalECPrivateKey(k)
	return a.write(name+".crt", "CERTIFICATE", der), a.write(name+".key", "EC PRIVATE KEY", kder)
}

// Over TCP the gateway must prove who it is, and so must the node.
func TestTLS(t *testing.T) {
	site, other := newAuthority(t, "site"), newAuthority(t, "other")
	cert, key := site.issue("127.0.0.1")
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(site.cert)
	s := newSite(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := serve(l, s.gw, credentials.NewTLS(&tls.Config{
		Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool, MinVersion: tls.VersionTLS13,
	}))
	t.Cleanup(srv.Stop)
	s.make(25)

	nodeCert, nodeKey := site.issue(node)
	strangerCert, strangerKey := other.issue(node)
	for name, tc := range map[string]struct {
		cfg  Config
		want string
	}{
		"gateway of another CA": {Config{CAFile: other.file, CertFile: nodeCert, KeyFile: nodeKey}, "certificate"},
		"node of another CA":    {Config{CAFile: site.file, CertFile: strangerCert, KeyFile: strangerKey}, ""},
		"node without one":      {Config{CAFile: site.file}, ""},
	} {
		tc.cfg.Target, tc.cfg.NodeID = "tcp://"+l.Addr().String(), node
		s.rep, err = New(tc.cfg, s.spool)
		if err != nil {
			t.Fatal(err)
		}
		s.rep.pace = quick
		s.run()
		s.until(name+": refused", func() bool {
			st := s.rep.Status()
			return st.State == Disconnected && strings.Contains(st.LastError, tc.want)
		})
		s.leave()
	}
	if s.gw.count() != 0 {
		t.Fatal("records went to a stranger or came from one")
	}

	s.rep, err = New(Config{Target: "tcp://" + l.Addr().String(), CAFile: site.file, CertFile: nodeCert, KeyFile: nodeKey, NodeID: node}, s.spool)
	if err != nil {
		t.Fatal(err)
	}
	s.rep.pace = quick
	s.run()
	s.shipped()
}
