// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
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

// authority makes certificates for the length of a test.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	file string // PEM of the certificate
}

func newAuthority(t *testing.T, name string) *authority {
	t.Helper()
	a := &authority{t: t, file: filepath.Join(t.TempDir(), name+".pem")}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a.key = key
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	writePEM(t, a.file, "CERTIFICATE", der)
	return a
}

// issue answers the files of a certificate for 127.0.0.1 and of its key.
func (a *authority) issue(name string) (cert, key string) {
	a.t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, &k.PublicKey, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		a.t.Fatal(err)
	}
	dir := a.t.TempDir()
	cert, key = filepath.Join(dir, name+".pem"), filepath.Join(dir, name+".key")
	writePEM(a.t, cert, "CERTIFICATE", der)
	writePEM(a.t, key, "PRIVATE KEY", pkcs8)
	return cert, key
}

func writePEM(t *testing.T, file, kind string, der []byte) {
	t.Helper()
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestGatewayOverTLS(t *testing.T) {
	ca, other := newAuthority(t, "ca"), newAuthority(t, "other")
	cert, key := ca.issue("gateway")
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	clients := x509.NewCertPool()
	clients.AddCert(ca.cert)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	serveGateway(t, l, credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{pair}, ClientCAs: clients,
		ClientAuth: tls.RequireAndVerifyClientCert, MinVersion: tls.VersionTLS13}))
	clientCert, clientKey := ca.issue("client")
	strangeCert, strangeKey := other.issue("client")
	addr := l.Addr().String()

	for _, test := range []struct {
		name   string
		args   []string
		code   int
		stderr string
	}{
		{"both known", []string{"--ca", ca.file, "--cert", clientCert, "--key", clientKey}, 0, ""},
		{"wrong authority", []string{"--ca", other.file, "--cert", clientCert, "--key", clientKey}, 1,
			"bulkhead node ls: no gateway at " + addr + ": x509: certificate signed by unknown authority"},
		{"no certificate for the client", []string{"--ca", ca.file}, 1, "bulkhead node ls: the gateway at " + addr + " "},
		{"strange client", []string{"--ca", ca.file, "--cert", strangeCert, "--key", strangeKey}, 1,
			"bulkhead node ls: the gateway at " + addr + " "},
		{"no such file", []string{"--ca", "testdata/nothing.pem"}, 1, "bulkhead node ls: --ca: open testdata/nothing.pem: no such file"},
		{"no certificate", []string{"--ca", "testdata/env.txt"}, 1, "bulkhead node ls: --ca: testdata/env.txt holds no PEM certificate"},
		{"key of another", []string{"--ca", ca.file, "--cert", clientCert, "--key", strangeKey}, 1, "bulkhead node ls: --cert, --key: "},
	} {
		t.Run(test.name, func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			code := run(append([]string{"node", "ls", "--gateway", addr}, test.args...), strings.NewReader(""), &stdout, &stderr)
			if code != test.code || !strings.HasPrefix(stderr.String(), test.stderr) || strings.Count(stderr.String(), "\n") > 1 {
				t.Errorf("exit %d, stderr %q; want %d, %q", code, &stderr, test.code, test.stderr)
			}
			if strings.HasSuffix(test.name, "client") && !strings.Contains(stderr.String(), "client certificate") {
				t.Errorf("stderr %q does not name the client certificate", &stderr)
			}
			if code == 0 && !strings.Contains(stdout.String(), "node-7f") {
				t.Errorf("stdout: %s", &stdout)
			}
		})
	}
	t.Run("nobody there", func(t *testing.T) {
		gone, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		gone.Close()
		var stderr bytes.Buffer
		code := run([]string{"usage", "--gateway", gone.Addr().String()}, strings.NewReader(""), &bytes.Buffer{}, &stderr)
		if want := "bulkhead usage: no gateway at " + gone.Addr().String() + ": connection refused\n"; code != 1 || stderr.String() != want {
			t.Errorf("exit %d, stderr %q; want %q", code, &stderr, want)
		}
	})
}
